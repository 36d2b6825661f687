"""The command profile on the demo model."""

import json
import subprocess
import sys

import pytest
from engines import DEMO_MODEL


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(None, marks=pytest.mark.slow),
        '{"method": "clasp", "adaptive": false, "optimization_interval": 2}',
    ],
)
def test_command(config, tmp_path):
    """Every part is there, and they add up."""
    path = tmp_path / "profile.json"
    command = [sys.executable, "-m", "clasp_vllm.cli", "profile", str(DEMO_MODEL)]
    command += ["--prompts=2", "--max-tokens=8", f"--json={path}"]
    command += [f"--speculative-config={config}"] if config else []
    engine = [
        "--enforce-eager",
        "--dtype=float32",
        "--max-model-len=256",
        "--kv-cache-memory-bytes=268435456",
    ]
    result = subprocess.run(
        [*command, "--", *engine],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    profile = json.loads(path.read_text())
    assert profile["tokens"] == 16
    assert sum(profile["parts"].values()) == pytest.approx(profile["seconds"], rel=0.01)
    assert profile["calls"]["verify: forward"] >= 2
    if config:
        assert profile["calls"]["optimise: forward"] > 0
        assert profile["calls"]["draft: forward"] > 0
        assert profile["counters"]["layer_skip_steps"] > 0
