"""The check of a GPU, as far as it goes without one."""

import json
import os
import subprocess
import sys

import pytest
from engines import ROOT

CHECK = ROOT / "scripts" / "gpu_check.sh"


def run(folder, *options: str) -> subprocess.CompletedProcess:
    """In another folder than the repository's."""
    return subprocess.run(
        [CHECK, *options],
        cwd=folder,
        env={**os.environ, "PYTHON": sys.executable, "OUT": "out"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_it_starts_in_any_folder(tmp_path):
    result = run(tmp_path, "--help")
    assert result.returncode == 0, result.stderr
    assert "segments" in result.stdout


@pytest.mark.slow
def test_segments_of_a_small_model(tmp_path):
    options = ["--small", "--only", "segments", "--engines", "skip16_k4", "--seconds", "110"]
    result = run(tmp_path, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    path = tmp_path / "out" / "results.json"
    assert result.stdout.splitlines()[-1] == f"results: {path}"
    results = json.loads(path.read_text())
    assert results["segments"].keys() == {"1", "8", "32"}
    for rows, segments in results["segments"].items():
        assert segments["rows"] == int(rows)
        assert min(segments["eager_6"], segments["eager_3"], segments["head"]) > 0
