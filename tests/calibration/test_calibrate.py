"""The command calibrate: what it writes, that it goes on where it stopped, and what it refuses."""

import json
import shutil
import subprocess
import sys

import pytest
from engines import DEMO_MODEL

from clasp_vllm.calibration.calibrate import EVERYTHING, OVERHEAD, promised
from clasp_vllm.calibration.store import Calibration, fingerprint
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
    found = Calibration(folder)
    manifest = found.manifest
    assert [task.name for task in manifest.tasks] == ["sql", "prose", EVERYTHING]
    assert (manifest.num_layers, manifest.hidden_size) == (24, 192)
    assert manifest.silhouette > 0
    assert found.masks().shape == (3, 24, 2)
    assert found.masks().any(dim=(1, 2)).all()
    assert found.anchors.vectors.shape == (4, 192)
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


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--tasks=chemistry"], "--tasks chemistry: allowed are maths"),
        (["--tasks=mine=missing.jsonl"], "--tasks mine=missing.jsonl: not lines"),
        (["--seed=1"], "holds a calibration with seed=0, not 1"),
    ],
)
def test_bad_options(folder, options, part, capsys):
    assert main(["calibrate", str(DEMO_MODEL), f"--output={folder}", *OPTIONS, *options]) == 2
    assert part in " ".join(capsys.readouterr().err.split())


def test_a_damaged_calibration(folder, tmp_path):
    with pytest.raises(ConfigError, match="clasp-vllm calibrate MODEL"):
        Calibration(tmp_path / "nowhere")
    for damage in ({"format": 9}, {"tasks": "none"}, {"surplus": 1}):
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
    found = Calibration(folder)
    found.check_shape(24, 192)
    with pytest.raises(ConfigError, match="24 layers of width 192; this one has 32 of 4096"):
        found.check_shape(32, 4096)
    with pytest.raises(ConfigError, match="other weights"):
        found.check_model("0" * 64)


def test_the_fingerprint_is_that_of_the_weights():
    from safetensors.torch import load_file

    weights = load_file(DEMO_MODEL / "model.safetensors")
    norms = [
        weights[f"model.layers.{layer}.{name}_layernorm.weight"]
        for layer in range(24)
        for name in ("input", "post_attention")
    ]
    norms.append(weights["model.norm.weight"])
    assert fingerprint(norms) == fingerprint([norm.float() for norm in norms])
    norms[3] = norms[3] * 1.1
    assert fingerprint(norms) != fingerprint([weights["model.norm.weight"]])


def test_what_a_set_promises_by_hand():
    """Half the time skipped, every token accepted: 9 tokens for 1 + 8 (0.5 + overhead) plain steps."""
    shares = [0.25, 0.25, 0.2, 0.2]
    assert promised(1.0, frozenset({0, 1}), shares) == pytest.approx(9 / (1 + 8 * (0.5 + OVERHEAD)))
    assert promised(0.0, frozenset({0}), shares) < 1
