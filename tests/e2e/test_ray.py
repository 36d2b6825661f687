"""Tensor parallelism over two of Ray's nodes: real Ray, two raylets on this machine, one rank on each.

vLLM keeps its Ray executors for GPUs; tests/harness lets them run on a CPU.
"""

import os
import threading
import time
from pathlib import Path

import openai
import pytest
from engines import DEMO_MODEL, PROMPTS, ROOT, engine_process, generate, running

from clasp_vllm.tools.servers import serve

pytestmark = pytest.mark.both_cores

CLASP = {
    "method": "clasp",
    "adaptive": False,
    "num_speculative_tokens": 4,
    "optimization_interval": 2,
    "draft_exit_threshold": 0.3,
}
PARALLEL = {
    "tensor_parallel_size": 2,
    "distributed_executor_backend": "ray",
    "kv_cache_memory_bytes": 256 << 20,
    "max_num_seqs": 8,
}


@pytest.fixture
def cluster(monkeypatch, request):
    """Nodes that say to have two GPUs together. Rank 0 on one core, rank 1 on the other."""
    nodes = getattr(request, "param", 2)
    import ray
    from ray.cluster_utils import Cluster

    # Not in the order that engine_process takes for V2's, and takes away.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT / "tests" / "harness")]))
    for name, value in (
        ("VLLM_CLASP_TEST_RAY", "1"),
        ("VLLM_CPU_OMP_THREADS_BIND", "0|1"),
        ("VLLM_ALLOW_INSECURE_SERIALIZATION", "1"),
        ("RAY_DEDUP_LOGS", "0"),
    ):
        monkeypatch.setenv(name, value)
    node = {"num_gpus": 2 // nodes, "num_cpus": 1, "object_store_memory": 128 << 20}
    ray_cluster = Cluster(initialize_head=True, head_node_args=node)
    if nodes == 2:
        ray_cluster.second = ray_cluster.add_node(**node)
    ray_cluster.wait_for_nodes()
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    try:
        yield ray_cluster
    finally:
        ray.shutdown()
        ray_cluster.shutdown()


def masks_node_and_rounds(worker) -> tuple[list, str, int]:
    """Every sequence's mask on this rank, the node it runs on, and the rounds it drafted in."""
    import ray

    drafter = worker.model_runner.drafter.drafter
    masks, rounds = drafter.sequences.masks.int().tolist(), drafter.statistics.total.rounds
    return masks, ray.get_runtime_context().get_node_id(), rounds


def alone() -> list[list[int]]:
    with running(max_num_seqs=8) as llm:
        return generate(llm, PROMPTS[:6], max_tokens=24).token_ids


def over_ray(executor: str) -> tuple:
    os.environ["VLLM_USE_RAY_V2_EXECUTOR_BACKEND"] = executor
    with running(speculative_config=CLASP, **PARALLEL) as llm:
        outcome = generate(llm, PROMPTS[:6], max_tokens=24)
        metrics = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
        return outcome, llm.collective_rpc(masks_node_and_rounds), metrics


# The older executor wants nodes of different addresses, which one machine has not.
OLDER = pytest.param("0", 1, marks=pytest.mark.slow)


@pytest.mark.parametrize(("executor", "cluster"), [("1", 2), OLDER], indirect=["cluster"])
def test_ranks_agree(executor, cluster):
    with engine_process("v1", forked=False) as call:
        plain = call(alone)
    with engine_process("v1", forked=False) as call:
        clasp, ranks, metrics = call(over_ray, executor)
    assert clasp.token_ids == plain
    assert clasp.num_accepted_tokens > 0
    (masks, node, rounds), (other_masks, other_node, other_rounds) = ranks
    assert masks == other_masks
    assert (node != other_node) == hasattr(cluster, "second")
    # Both ranks draft in every round; it is counted once.
    assert metrics["vllm:layer_skip_rounds"] == rounds == other_rounds > 0


@pytest.mark.slow
def test_served(cluster, tmp_path):
    """The command of the README."""
    with engine_process("v1", forked=False) as call:
        plain = call(texts)
    arguments = ["--tensor-parallel-size=2", "--distributed-executor-backend=ray", "--dtype=float32"]
    arguments += ["--enforce-eager", "--max-model-len=512", "--max-num-seqs=8"]
    arguments += ["--kv-cache-memory-bytes=268435456", '--speculative-config={"method": "clasp"}']
    with serve(DEMO_MODEL, *arguments, log=tmp_path / "log", port=8220) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120)
        for prompt, expected in zip(PROMPTS[:4], plain, strict=True):
            answer = client.completions.create(
                model=str(DEMO_MODEL),
                prompt=prompt,
                max_tokens=24,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
            assert answer.choices[0].text == expected


def texts() -> list[str]:
    with running(max_num_seqs=8) as llm:
        return generate(llm, PROMPTS[:4], max_tokens=24).texts


def until_a_node_dies(ready: Path, killed: Path) -> tuple[bool, str]:
    """Generate without end; what is raised when it ends all the same, and whether after the death."""
    with running(speculative_config=CLASP, **PARALLEL) as llm:
        generate(llm, PROMPTS[:2], max_tokens=4)
        ready.touch()
        try:
            while True:
                generate(llm, PROMPTS[:2], max_tokens=64)
        except BaseException as error:  # whatever it is: the test reads it
            return killed.exists(), f"{type(error).__name__}: {error}"


@pytest.mark.slow
def test_the_engine_ends_when_a_node_dies(cluster, tmp_path):
    """An error, not silence. Whoever runs the server starts it anew."""
    ready, killed = tmp_path / "ready", tmp_path / "killed"

    def kill() -> None:
        while not ready.exists():
            time.sleep(0.5)
        time.sleep(3)
        killed.touch()
        cluster.remove_node(cluster.second, allow_graceful=False)

    threading.Thread(target=kill, daemon=True).start()
    with engine_process("v1", forked=False) as call:
        after, error = call(until_a_node_dies, ready, killed)
    assert after
    # What waits for the workers' answer is told that there will be none, or sees the actor's death first.
    assert error.startswith(("RuntimeError: cancelled", "EngineDeadError", "ActorDiedError")), error
