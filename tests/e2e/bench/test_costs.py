"""The command costs on a real engine."""

import json
import subprocess
import sys

import pytest
from engines import DEMO_MODEL

from clasp_vllm.bench.costs import break_even_table, cost_table
from clasp_vllm.tools.cost_model import costs_by_batch


def test_command(tmp_path):
    path = tmp_path / "costs.json"
    command = [sys.executable, "-m", "clasp_vllm.cli", "costs", str(DEMO_MODEL), f"--json={path}"]
    command += ["--batch=1,3", "--repeats=4", "--longest=4", "--"]
    command += [
        "--enforce-eager",
        "--dtype=float32",
        "--max-model-len=512",
        "--kv-cache-memory-bytes=268435456",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    measured = json.loads(path.read_text())
    costs = costs_by_batch(measured)
    assert measured["about"]["model"] == str(DEMO_MODEL)
    assert measured["read_bandwidth"] > 0
    assert measured["bytes_per_token"] == pytest.approx(
        2 * DEMO_MODEL.joinpath("model.safetensors").stat().st_size, rel=0.01
    )
    assert costs.keys() == {1, 3}
    for one in costs.values():
        assert one.step.keys() == {0, 1, 2, 4}
        assert min(one.step.values()) > 0
        # A layer of this model takes far longer than nothing and far less than a step.
        assert 0 < one.layer < one.step[0]
        assert one.layer < one.optimize
    for samples in measured["samples"]:
        assert all(len(samples[str(("step", k))]) >= 4 for k in (0, 1, 2, 4))
    assert cost_table(list(costs.values())) in result.stdout
    assert break_even_table(list(costs.values()), 24, 4) in result.stdout
