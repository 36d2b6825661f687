"""Exclusive times add up to the whole, whatever calls what."""

import time
from types import SimpleNamespace

import pytest

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
