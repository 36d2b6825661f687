"""The command bench, whole."""

import json
import subprocess
import sys

import pytest
from engines import DEMO_MODEL

from clasp_vllm.engine.hooks import SUPPORTED


@pytest.mark.slow
def test_command(tmp_path):
    """--quick, whole: real servers, real clients, own prompts and chat requests, a table and a plot."""
    path = tmp_path / "question.jsonl"
    lines = [{"question_id": 7, "category": "math", "turns": ["What is 2 + 3?", "And twice that?"]}]
    lines += [{"question_id": i, "category": "qa", "turns": [f"What is {i} + 1?"]} for i in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = subprocess.run(
        [sys.executable, "-m", "clasp_vllm.cli", "bench", str(DEMO_MODEL), "--quick", f"--output={tmp_path}",
         "--tasks=mixed,spec_bench/multi_turn,spec_bench/qa", f"--spec-bench={path}",
         "--prompts=2", "--max-tokens=16", "--", "--dtype=float32", "--enforce-eager", "--max-model-len=512",
         "--max-num-seqs=8", "--kv-cache-memory-bytes=268435456"],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["measurements"]) == 12
    assert all(one["failed"] == 0 for one in results["measurements"])
    for one in results["measurements"]:
        mixed = one["workload"]["task"] == "mixed"
        # Own prompts have answers of set lengths; Spec-Bench's answers end where the model ends them.
        assert one["tokens"] == [8, 18] if mixed else max(one["tokens"]) <= 16
        assert one["tokens_per_second"] == pytest.approx(sum(one["tokens"]) / one["seconds"])
        assert one["answers_before"] > 0
    first, second = results["spec_bench"]["spec_bench/multi_turn"]
    assert (first["question"], first["turn"], first["answers"]) == ("7", 1, [])
    # Rendered prompts are chat requests: the second turn follows the very answer that was measured.
    assert second["turn"] == 2
    asked = [one for one in results["measurements"] if one["workload"]["task"] == "spec_bench/multi_turn"]
    assert {one["texts"][0].strip() for one in asked} == {second["answers"][0].strip()}
    assert [one["question"] for one in results["spec_bench"]["spec_bench/qa"]] == ["0", "1"]
    clasp = next(m for m in results["measurements"] if "clasp" in m["method"] and not m["plain"])
    assert clasp["accepted_length"] > 1
    assert results["about"]["vllm"].startswith(SUPPORTED)
    report = (tmp_path / "results.md").read_text()
    assert "2 of 2" in report
    assert "| method | at once | temperature | multi_turn | qa | mean |" in report
