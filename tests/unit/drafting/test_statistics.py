"""What drafting counts: each thing once, however often it is asked for."""

import torch

from clasp_vllm.control import costs as timing
from clasp_vllm.device import DeviceEvent
from clasp_vllm.drafting.sequences import SequenceTable
from clasp_vllm.drafting.statistics import PLAIN_AT_ONCE, DraftStatistics
from clasp_vllm.skipping.skip_mask import layers_mask


def test_counts_are_taken_once(monkeypatch):
    now = iter((1.0, 3.5))
    statistics = DraftStatistics(4)
    with monkeypatch.context() as clock:
        clock.setattr(timing.time, "perf_counter", lambda: next(now))
        started, ended = DeviceEvent(torch.device("cpu")), DeviceEvent(torch.device("cpu"))
    masks = torch.stack((layers_mask(4, [1]), layers_mask(4, [1, 2])))
    masks[1, 3, 0] = True
    statistics.count_round(masks, steps=3, optimized=2)
    statistics.count_pass(started, ended)
    assert statistics.take_skips() == [0.0, 2.0, 1.0, 0.5]
    assert statistics.take_kept() == {3.0: 1, 1.5: 1}
    assert statistics.take() == {"rounds": 1, "steps": 3, "optimized": 2, "passes": 1, "pass_seconds": 2.5}
    assert statistics.take_kept() == {}
    assert statistics.take_skips() == []
    assert statistics.take() == {}


def test_steps_without_drafts_are_told_of_together_or_with_others():
    statistics = DraftStatistics(4)
    told = []
    for _ in range(2 * PLAIN_AT_ONCE):
        statistics.total.plain_steps += 1
        told.append(statistics.take())
    assert told == 2 * ([{}] * (PLAIN_AT_ONCE - 1) + [{"plain_steps": PLAIN_AT_ONCE}])
    statistics.total.plain_steps += 1
    statistics.total.failures += 1
    assert statistics.take() == {"plain_steps": 1, "failures": 1}


def test_a_pass_counts_when_the_device_has_ended_it():
    class Late(DeviceEvent):
        done = False

        def reached(self):
            return self.done

    statistics = DraftStatistics(4)
    started, late = DeviceEvent(torch.device("cpu")), Late(torch.device("cpu"))
    statistics.count_pass(started, late)
    assert statistics.take() == {"passes": 1}
    late.done = True
    assert "pass_seconds" in statistics.take()


def test_masks_that_change():
    table = SequenceTable(2, layers_mask(4, [1]).unsqueeze(0))
    table.slots(["a", "b"])
    new = torch.stack((layers_mask(4, [1]), layers_mask(4, [2]))).unsqueeze(1)
    table.set_masks(["a", "b"], new)
    assert table.changed == 1
    table.set_masks(["a", "b"], new)
    table.set_masks(["gone"], new[:1])
    assert table.changed == 1


def test_skips_are_counted_past_what_float32_holds():
    statistics = DraftStatistics(1)
    statistics.total.skips += 2**24
    statistics.take_kept()
    statistics.count_round(layers_mask(1, [0]).unsqueeze(0), steps=1, optimized=0)
    assert statistics.take_skips() == [2**24 + 1]
