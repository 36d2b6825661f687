"""A calibration that was cut short or is of something else gets one message that says what to do."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clasp_vllm.calibration.store import FORMAT, Calibration, Manifest, Task, save
from clasp_vllm.config import ConfigError
from clasp_vllm.policies.anchors import Anchors

LAYERS, WIDTH = 4, 8


@pytest.fixture
def folder(tmp_path) -> Path:
    """A calibration of two tasks and the one for everything else."""
    tasks = [
        Task(name=name, skip_attention=[1], skip_mlp=[1, 2], acceptance=0.9, speedup=1.1, trials=3)
        for name in ("a", "b", "rest")
    ]
    manifest = Manifest(
        format=FORMAT,
        model="m",
        fingerprint=None,
        num_layers=LAYERS,
        hidden_size=WIDTH,
        tasks=tasks,
        silhouette=None,
        settings={},
        versions={},
    )
    anchors = Anchors(torch.eye(2, WIDTH), torch.tensor([0, 1]), torch.tensor([0.5, 0.5]))
    save(tmp_path, manifest, anchors, torch.ones(2 * LAYERS + 1, WIDTH))
    return tmp_path


def test_intact(folder):
    assert Calibration(folder).masks().shape == (3, LAYERS, 2)


@pytest.mark.parametrize("name", ["manifest.json", "anchors.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_cut_short(folder, name, share):
    path = folder / name
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(ConfigError, match=r"cannot be read: .* make one with `clasp-vllm calibrate") as error:
        Calibration(folder)
    assert str(folder) in str(error.value)
    assert len(str(error.value)) < 700


@pytest.mark.parametrize("name", ["manifest.json", "anchors.safetensors"])
@pytest.mark.parametrize("kind", ["garbage", "folder", "missing", "nested"])
def test_something_else_in_its_place(folder, name, kind):
    path = folder / name
    path.unlink()
    if kind == "garbage":
        path.write_bytes(bytes(range(256)) * 40)
    elif kind == "folder":
        path.mkdir()
    elif kind == "nested":
        path.write_text("[" * 10**5)
    with pytest.raises(ConfigError, match=r"cannot be read: .* make one with `clasp-vllm calibrate"):
        Calibration(folder)


DAMAGES = {
    "vectors": [
        torch.ones(2, WIDTH + 1),
        torch.ones(WIDTH),
        torch.ones(0, WIDTH),
        torch.full((2, WIDTH), torch.nan),
        torch.ones(2, WIDTH, dtype=torch.int32),
    ],
    "tasks": [torch.tensor([0, 2]), torch.tensor([0]), torch.tensor([-1, 0]), torch.tensor([0.0, 0.5])],
    "least": [torch.tensor([0.5]), torch.tensor(0.5), torch.tensor([torch.nan, 0.5])],
    "norms": [torch.ones(WIDTH), torch.full((2 * LAYERS + 1, WIDTH), torch.nan)],
}


@pytest.mark.parametrize(
    ("name", "tensor"), [(name, tensor) for name, tensors in DAMAGES.items() for tensor in tensors]
)
def test_other_tensors(folder, name, tensor):
    path = folder / "anchors.safetensors"
    save_file(load_file(path) | {name: tensor}, path)
    with pytest.raises(ConfigError, match=r"is damaged: .*; make it again"):
        Calibration(folder)


def test_a_manifest_of_a_gigabyte(folder):
    """It has no bytes on the disk, and none of them is read."""
    os.truncate(folder / "manifest.json", 1 << 30)
    with pytest.raises(ConfigError, match=r"cannot be read: manifest\.json has 1073741824 bytes"):
        Calibration(folder)


def test_a_mask_of_layers_that_are_not_there(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tasks"][0]["skip_mlp"] = [LAYERS]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"a skips layers that the model does not have"):
        Calibration(folder)
    shutil.rmtree(folder)
    with pytest.raises(ConfigError, match=r"No such file"):
        Calibration(folder)
