"""The benchmark: ratios of neighbouring measurements, a report, and the whole command."""

import argparse
import json
import subprocess
import sys

import pytest
from engines import DEMO_MODEL

from clasp_vllm.bench.report import pairs, ratio, spread, write_report
from clasp_vllm.bench.serving import METHODS, add_arguments, fill_in
from clasp_vllm.config import is_ours, parse_config


def row(method: str, plain: bool, repeat: int, speed: float, text: str = "a", task: str = "maths") -> dict:
    return {
        "method": method,
        "plain": plain,
        "workload": {"task": task, "concurrency": 1, "temperature": 0.0},
        "repeat": repeat,
        "tokens_per_second": speed,
        "accepted_length": None if plain else 2.5,
        "acceptance_by_position": [] if plain else [0.9, 0.6],
        "ttft_p50": 10.0,
        "tpot_p50": 5.0,
        "tpot_p95": 6.0,
        "failed": 0,
        "texts": [text, "b"],
    }


RESULTS = {
    "about": {"command": "clasp-vllm bench", "machine": "a machine", "date": "a day"},
    "methods": {"x": "{}", "y": "{}"},
    "measurements": [
        row("x", True, 0, 100.0),
        row("x", False, 0, 150.0),
        row("x", False, 1, 100.0, "other"),
        row("x", True, 1, 50.0),
        row("y", True, 0, 80.0),
        row("y", False, 0, 40.0),
        row("y", False, 1, 1.0),  # interrupted: no neighbour
    ],
}


def test_ratios_are_of_neighbours():
    found = {key[0]: [ratio(pair) for pair in both] for key, both in pairs(RESULTS).items()}
    assert found == {"x": [1.5, 2.0], "y": [0.5]}
    assert spread(found["x"]) == "1.75 (1.50 to 2.00)"


def test_report(tmp_path):
    write_report(RESULTS, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "a machine" in text
    line = next(line for line in text.splitlines() if line.startswith("| x |"))
    assert "| 1.75 (1.50 to 2.00) | 75.0 | 125.0 | 2.50 | 0.90 0.60 |" in line
    assert line.endswith("| 3 of 4 |")
    assert (tmp_path / "ratio-temperature-0.png").read_bytes().startswith(b"\x89PNG")


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["model", *arguments])


def test_defaults():
    args = options()
    assert fill_in(args).keys() == METHODS.keys()
    assert args.concurrency == [1, 2, 4, 8, 16]
    for config in METHODS.values():
        if is_ours(config):
            parse_config(config)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--tasks", "chemistry"], "--tasks chemistry: allowed are maths"),
        (["--tasks", "spec_bench/qa"], "needs --spec-bench"),
        (["--method", "fast"], "--method fast: allowed is NAME=CONFIG"),
    ],
)
def test_bad_options(arguments, part):
    with pytest.raises(ValueError, match=part):
        fill_in(options(*arguments))


@pytest.mark.slow
def test_command(tmp_path):
    """--quick, whole: real servers, real clients, a table and a plot."""
    result = subprocess.run(
        [sys.executable, "-m", "clasp_vllm.cli", "bench", str(DEMO_MODEL), "--quick", f"--output={tmp_path}",
         "--max-tokens=16", "--", "--dtype=float32", "--enforce-eager", "--max-model-len=512",
         "--max-num-seqs=8", "--kv-cache-memory-bytes=268435456"],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert len(found["measurements"]) == 4
    assert all(one["failed"] == 0 for one in found["measurements"])
    clasp = next(m for m in found["measurements"] if "clasp" in m["method"] and not m["plain"])
    assert clasp["accepted_length"] > 1
    assert found["about"]["vllm"].startswith("0.32")
    assert "5 of 5" in (tmp_path / "results.md").read_text()
