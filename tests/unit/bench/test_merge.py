"""Runs of a benchmark made one: every ratio is there, and is what it was."""

import json
import subprocess
import sys
from pathlib import Path

from engines import ROOT

from clasp_vllm.bench.report import pairs, ratio

PUBLISHED = json.loads((ROOT / "tests/data/methods.json").read_text())


def run_of(methods: list[str], folder: Path) -> Path:
    """What was published, of these methods alone."""
    folder.mkdir()
    results = PUBLISHED | {
        "methods": {name: PUBLISHED["methods"][name] for name in methods},
        "measurements": [row for row in PUBLISHED["measurements"] if row["method"] in methods],
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def merge(runs: list[Path], output: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/bench/merge.py", *map(str, runs), "--output", str(output)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


def ratios(results: dict) -> dict:
    return {key: sorted(map(ratio, both)) for key, both in pairs(results).items()}


def test_methods_of_two_runs(tmp_path):
    first, *others = PUBLISHED["methods"]
    runs = [run_of([first], tmp_path / "first"), run_of(others, tmp_path / "others")]
    assert merge(runs, tmp_path / "both").returncode == 0
    merged = json.loads((tmp_path / "both/results.json").read_text())
    assert ratios(merged) == ratios(PUBLISHED)
    table = (tmp_path / "both/results.md").read_text()
    assert all(f"| {name} |" in table for name in (first, *others))
    assert (tmp_path / "both/ratio-domain-shift.png").stat().st_size > 1000


def test_repeats_of_two_runs(tmp_path):
    one = run_of(list(PUBLISHED["methods"])[:1], tmp_path / "one")
    assert merge([one, one], tmp_path / "both").returncode == 0
    merged = json.loads((tmp_path / "both/results.json").read_text())
    once = ratios(json.loads((one / "results.json").read_text()))
    assert ratios(merged) == {key: sorted(2 * values) for key, values in once.items()}


def test_one_name_for_two_configurations_is_refused(tmp_path):
    name = next(iter(PUBLISHED["methods"]))
    one, other = (run_of([name], tmp_path / folder) for folder in ("one", "other"))
    changed = json.loads((other / "results.json").read_text())
    changed["methods"][name] = "{}"
    (other / "results.json").write_text(json.dumps(changed))
    result = merge([one, other], tmp_path / "both")
    assert result.returncode == 2
    assert name in result.stderr
    assert not (tmp_path / "both").exists()
