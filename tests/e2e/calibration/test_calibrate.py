"""The command calibrate: what it writes, that it goes on where it stopped, and what it refuses."""

import json
import shutil
import subprocess
import sys

import pytest
from engines import DEMO_MODEL, tiny_llama

from clasp_vllm.calibration.calibrate import EVERYTHING
from clasp_vllm.calibration.fingerprint import fingerprint
from clasp_vllm.calibration.store import Calibration
from clasp_vllm.cli import main
from clasp_vllm.config import ConfigError

OPTIONS = ["--trials=5", "--max-tokens=6", "--search-prompts=2", "--anchors=2", "--tasks=sql,prose"]
ENGINE = ["--dtype=float32", "--enforce-eager", "--max-model-len=512", "--kv-cache-memory-bytes=67108864"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration")
    command = [sys.executable, "-m", "clasp_vllm.cli", "calibrate", str(DEMO_MODEL), f"--output={path}"]
    result = subprocess.run(
        [*command, *OPTIONS, "--", *ENGINE], capture_output=True, text=True, timeout=500, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "silhouette" in result.stderr
    return path


def test_what_it_writes(folder):
    calibration = Calibration(folder)
    manifest = calibration.manifest
    assert [task.name for task in manifest.tasks] == ["sql", "prose", EVERYTHING]
    assert (manifest.num_layers, manifest.hidden_size) == (24, 192)
    assert manifest.silhouette > 0
    assert calibration.masks().shape == (3, 24, 2)
    assert calibration.masks().any(dim=(1, 2)).all()
    assert calibration.anchors.vectors.shape == (4, 192)
    assert all(len((folder / f"trials-{t.name}.jsonl").read_text().splitlines()) == 5 for t in manifest.tasks)
    assert (folder / "anchors.png").read_bytes().startswith(b"\x89PNG")
    assert "vllm" in json.loads((folder / "about.json").read_text())


def test_interrupted_it_goes_on_and_ends_with_the_same_files(folder, tmp_path):
    """Stopped in the middle of a line of the second task's trials."""
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    for name in ("manifest.json", "anchors.safetensors", "anchors.png", f"trials-{EVERYTHING}.jsonl"):
        (again / name).unlink()
    trials = again / "trials-prose.jsonl"
    trials.write_text(trials.read_text()[:-20])
    assert main(["calibrate", str(DEMO_MODEL), f"--output={again}", *OPTIONS, "--", *ENGINE]) == 0
    for path in folder.iterdir():
        if path.name != "about.json":
            assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_model_that_was_replaced_is_noticed(folder, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    model, again = tmp_path / "model", tmp_path / "again"
    shutil.copytree(DEMO_MODEL, model)
    shutil.copytree(folder, again)
    settings = json.loads((again / "settings.json").read_text()) | {"model": str(model)}
    (again / "settings.json").write_text(json.dumps(settings))
    weights = load_file(model / "model.safetensors")
    weights["model.layers.3.self_attn.q_proj.weight"] *= 2  # the norms stay as they are
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert main(["calibrate", str(model), f"--output={again}", *OPTIONS, "--", *ENGINE]) == 2
    assert "holds a calibration with weights=" in " ".join(capsys.readouterr().err.split())
    Calibration(folder).check_checkpoint(fingerprint(str(DEMO_MODEL)))
    with pytest.raises(ConfigError, match="checkpoint has other weights"):
        Calibration(folder).check_checkpoint(fingerprint(str(model)))


def test_a_search_with_another_model(folder, tmp_path, capsys):
    """One of fewer layers is refused, before anything is searched."""
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    other = tiny_llama(tmp_path / "tiny")
    settings = json.loads((again / "settings.json").read_text()) | {"search_model": str(other)}
    settings["weights to search with"] = fingerprint(str(other))
    (again / "settings.json").write_text(json.dumps(settings))
    options = [f"--search-model={other}", f"--output={again}", *OPTIONS]
    assert main(["calibrate", str(DEMO_MODEL), *options, "--", *ENGINE]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "has 6 layers; allowed are models of 24" in message


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--tasks=chemistry"], "--tasks chemistry: allowed are maths"),
        (["--tasks=mine=missing.jsonl"], "--tasks mine=missing.jsonl: not lines"),
        (["--tasks=my/task=x.jsonl"], "--tasks my/task=x.jsonl: allowed are names of letters"),
        (["--tasks=sql,sql"], "each once"),
        (["--seed=1"], "holds a calibration with seed=0, not 1"),
        (["--", "--revision=abc"], "--revision: not allowed here"),
    ],
)
def test_bad_options(folder, options, part, capsys):
    assert main(["calibrate", str(DEMO_MODEL), f"--output={folder}", *OPTIONS, *options, "--", *ENGINE]) == 2
    assert part in " ".join(capsys.readouterr().err.split())


def test_a_damaged_calibration(folder, tmp_path):
    with pytest.raises(ConfigError, match="clasp-vllm calibrate MODEL"):
        Calibration(tmp_path / "nowhere")
    intact = json.loads((folder / "manifest.json").read_text())
    beyond = [intact["tasks"][0] | {"skip_mlp": [24]}, *intact["tasks"][1:]]
    for damage in (
        {"format": 9},
        {"tasks": "none"},
        {"tasks": []},
        {"tasks": beyond},
        {"tasks": intact["tasks"][:2]},
        {"surplus": 1},
        {"hidden_size": 64},
        {"fingerprint": 3},
    ):
        copy = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(folder, copy)
        manifest = json.loads((copy / "manifest.json").read_text()) | damage
        (copy / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ConfigError, match=r"calibration=.*"):
            Calibration(copy)
    (copy / "anchors.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match="cannot be read"):
        Calibration(copy)


def test_a_calibration_of_another_model(folder):
    calibration = Calibration(folder)
    calibration.check_shape(24, 192)
    with pytest.raises(ConfigError, match="24 layers of width 192; this one has 32 of 4096"):
        calibration.check_shape(32, 4096)
    calibration.check_model([norm.half() for norm in calibration.norms])
    with pytest.raises(ConfigError, match="other weights"):
        calibration.check_model([norm * 1.1 for norm in calibration.norms])


def test_the_norms_are_the_models(folder):
    from safetensors.torch import load_file

    weights = load_file(DEMO_MODEL / "model.safetensors")
    names = [
        f"layers.{layer}.{part}_layernorm" for layer in range(24) for part in ("input", "post_attention")
    ]
    Calibration(folder).check_model([weights[f"model.{name}.weight"] for name in (*names, "norm")])
