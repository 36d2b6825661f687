"""Exclusive times add up to the whole, whatever calls what."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from engines import DEMO_MODEL

from clasp_vllm.bench.profile import Stopwatch
from clasp_vllm.tools.prompts import mixed_prompts, task_prompts


def test_exclusive_times_add_up():
    inner = SimpleNamespace(work=lambda: time.sleep(0.02))
    outer = SimpleNamespace(work=lambda: (time.sleep(0.01), inner.work(), inner.work()))
    stopwatch = Stopwatch()
    stopwatch.watch(inner, "work", "inner")
    stopwatch.watch(outer, "work", "outer")
    started = time.perf_counter()
    stopwatch.reset()
    outer.work()
    with pytest.raises(TypeError):
        inner.work("unexpected")
    stopwatch.stop()
    whole = time.perf_counter() - started
    assert stopwatch.calls == {"outer": 1, "inner": 3}
    assert sum(stopwatch.parts.values()) == pytest.approx(whole, abs=0.05)
    assert stopwatch.parts["inner"] > stopwatch.parts["outer"] > 0


def test_a_part_can_belong_to_what_calls_it():
    head = SimpleNamespace(work=lambda: None)
    verify, draft = (SimpleNamespace(work=lambda: head.work()) for _ in range(2))
    stopwatch = Stopwatch()
    stopwatch.watch(head, "work", "{}: head")
    stopwatch.watch(verify, "work", "verify: forward")
    stopwatch.watch(draft, "work", "draft: forward")
    verify.work()
    draft.work()
    draft.work()
    assert stopwatch.calls["verify: head"] == 1
    assert stopwatch.calls["draft: head"] == 2


def test_tasks_take_turns():
    prompts = mixed_prompts(12)
    assert prompts[0] == task_prompts("maths")[0]
    assert prompts[5] == task_prompts("maths")[1]
    assert len({*mixed_prompts(25)}) == 25
    assert mixed_prompts(26)[-1] == prompts[0]


@pytest.mark.parametrize(
    "config", [None, '{"method": "clasp", "adaptive": false, "optimization_interval": 2}']
)
def test_command(config, tmp_path):
    """The command on the demo model: every part is there, and they add up."""
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
