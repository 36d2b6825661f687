"""Arguments and example files for Ray Serve, KubeRay and the cluster launcher."""

import json
from pathlib import Path

import pytest
import yaml
from engines import ROOT


def test_a_bad_argument_is_refused_before_anything_is_deployed():
    from clasp_vllm.config import ConfigError
    from clasp_vllm.ray_serve import build

    with pytest.raises(ConfigError, match="num_skipped_layer"):
        build({"model": "m", "speculative_config": {"method": "clasp", "num_skipped_layer": 3}})
    with pytest.raises(ValueError, match="modle"):
        build({"modle": "m"})


def test_the_example_is_one_that_serve_takes():
    from ray.serve import schema

    from clasp_vllm.ray_serve import ServerArguments

    config = yaml.safe_load((ROOT / "configs" / "ray" / "serve.yaml").read_text())
    manifest = yaml.safe_load((ROOT / "configs" / "ray" / "rayservice.yaml").read_text())
    for one in (config, yaml.safe_load(manifest["spec"]["serveConfigV2"])):
        (application,) = schema.ServeDeploySchema(**one).applications
        assert application.import_path == "clasp_vllm.ray_serve:build"
        assert "--speculative-config" in ServerArguments(**application.args).command_line()


# Of KubeRay's reference of ray.io/v1 (docs/reference/api.md).
KUBERAY = {
    "RayService": {
        "serveConfigV2", "rayClusterConfig", "serveService", "upgradeStrategy", "excludeHeadPodFromServeSvc",
    },
    "RayCluster": {
        "rayVersion", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling", "autoscalerOptions",
        "headServiceAnnotations", "gcsFaultToleranceOptions", "managedBy", "suspend",
    },
    "HeadGroup": {"template", "rayStartParams", "headService", "enableIngress", "serviceType"},
    "WorkerGroup": {
        "groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template", "numOfHosts",
        "scaleStrategy", "idleTimeoutSeconds", "suspend",
    },
}  # fmt: skip


def test_the_manifest_is_one_that_kubernetes_and_kuberay_take():
    import kubernetes_validate

    manifest = yaml.safe_load((ROOT / "configs" / "ray" / "rayservice.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    cluster = manifest["spec"]["rayClusterConfig"]
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert manifest["spec"].keys() <= KUBERAY["RayService"]
    assert cluster.keys() <= KUBERAY["RayCluster"]
    assert head.keys() <= KUBERAY["HeadGroup"]
    assert all(group.keys() <= KUBERAY["WorkerGroup"] for group in workers)
    for group in (head, *workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "p"},
            "spec": group["template"]["spec"],
        }
        kubernetes_validate.validate(pod, "1.31", strict=True)
        container = pod["spec"]["containers"][0]
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(
                pod | {"spec": {"containers": [container | {"imag": ""}]}}, "1.31", strict=True
            )
    (application,) = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
    (deployment,) = application["deployments"]
    most = deployment["autoscaling_config"]["max_replicas"]
    assert cluster["enableInTreeAutoscaling"]
    assert sum(group["maxReplicas"] for group in workers) > most  # of one GPU each, and one to surge


def test_the_cluster_launchers_example_is_valid():
    import jsonschema
    import ray

    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    config = yaml.safe_load((ROOT / "configs" / "ray" / "cluster.yaml").read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"max_worker": 1}, schema)
