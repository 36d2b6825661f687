"""Costs of passes: measured with a clock that the test sets."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from clasp_vllm.control import costs as timing
from clasp_vllm.control.costs import (
    SIZES,
    ContextPass,
    CostCorrections,
    PassCosts,
    measure_context_costs,
    measure_pass_costs,
)
from clasp_vllm.device import DeviceEvent


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

    monkeypatch.setattr(timing.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_costs_are_those_of_the_passes(clock):
    def forward(rows: int, layers: int) -> None:
        clock.now += 0.5 + 0.01 * rows + layers * (0.2 + 0.1 * rows)

    costs = measure_pass_costs(forward, 6, 20, lambda: None)
    assert costs.rows == (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
    assert costs.layer == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.4, 1.8])
    assert costs.fixed == pytest.approx([0.51, 0.52, 0.53, 0.54, 0.56, 0.58, 0.62, 0.66])
    assert float(costs.forward(5, 2)) == pytest.approx(0.55 + 2 * 0.7)
    assert float(costs.forward(20, 1)) == pytest.approx(0.7 + 2.2)


def test_more_rows_may_cost_less(clock):
    def forward(rows: int, layers: int) -> None:
        clock.now += layers * (0.2 if rows < 4 else 0.1)

    assert measure_pass_costs(forward, 6, 4, lambda: None).layer == pytest.approx([0.2, 0.2, 0.2, 0.1])


def see(clock, corrections: CostCorrections, kind: str, rows: float, took: float, times: int = 1) -> None:
    """Something that should have taken 0.2 s took longer or less."""
    for _ in range(times):
        start = DeviceEvent(torch.device("cpu"))
        clock.now += took
        corrections.add(kind, rows, 0.2, start, DeviceEvent(torch.device("cpu")))
        corrections.settle()


def test_corrections_come_to_what_is_seen(clock):
    corrections = CostCorrections()
    see(clock, corrections, "draft_scale", 0, 0.3, times=100)
    assert corrections.scales["draft_scale"] == pytest.approx([1.5], rel=1e-3)
    assert (corrections.scales["pass_scale"] == 1.0).all()
    assert (corrections.scales["verify_scale"] == 1.0).all()


def test_draft_steps_have_a_correction_for_each_context(clock):
    """What reading a long context takes may be off otherwise than all else."""
    corrections = CostCorrections(contexts=3)
    see(clock, corrections, "draft_scale", 0, 0.3, times=100)
    assert corrections.scales["draft_scale"] == pytest.approx([1.5] * 3, rel=1e-3)  # those not seen follow
    see(clock, corrections, "draft_scale", 2, 0.1, times=100)
    assert corrections.scales["draft_scale"] == pytest.approx([1.5, 1.0, 0.5], rel=1e-3)
    costs = PassCosts((1.0,), (0.2,), (0.0,)).scaled(corrections.scales)
    for context, seconds in enumerate((0.3, 0.2, 0.1)):
        of_context = costs.over(np.array([5000]), 256, context)
        assert float(of_context.draft_step(1, 1)) == pytest.approx(seconds, rel=1e-2)


def test_sizes_and_kinds_of_steps_have_corrections_of_their_own(clock):
    corrections = CostCorrections()
    see(clock, corrections, "verify_scale", 8, 0.3, times=100)
    # What has not been seen follows.
    assert corrections.scales["verify_scale"] == pytest.approx([1.5] * len(SIZES), rel=1e-3)
    assert corrections.scales["plain_scale"] == pytest.approx([1.5] * len(SIZES), rel=1e-3)
    see(clock, corrections, "plain_scale", 4, 0.1, times=100)
    at_four, at_eight = SIZES.index(4), SIZES.index(8)
    assert corrections.scales["plain_scale"][at_four] == pytest.approx(0.5, rel=1e-3)
    assert corrections.scales["verify_scale"][at_eight] == pytest.approx(1.5, rel=1e-3)
    see(clock, corrections, "verify_scale", 7, 0.6, times=100)  # between six and eight
    costs = PassCosts((1.0,), (0.2,), (0.0,)).scaled(corrections.scales)
    assert float(costs.verify(7, 1)) == pytest.approx(0.6, rel=1e-2)
    assert float(costs.plain(4, 1)) == pytest.approx(0.1, rel=1e-2)
    assert corrections.scales["verify_scale"][at_eight] > 2.0


def test_sizes_not_seen_lie_between_those_seen(clock):
    """However often the machine becomes slower and faster, and at however many sizes that is seen."""
    corrections = CostCorrections()
    for took in (0.2, 0.3, 0.15, 0.3, 0.2, 0.3):
        for rows in (1, 2, 3, 4, 6, 8):
            see(clock, corrections, "verify_scale", rows, took, times=40)
    for name in ("verify_scale", "plain_scale"):
        assert corrections.scales[name] == pytest.approx([1.5] * len(SIZES), rel=0.02)
    see(clock, corrections, "verify_scale", 16, 0.1, times=100)
    at = [SIZES.index(size) for size in (8, 12, 16, 512)]
    assert corrections.scales["verify_scale"][at] == pytest.approx([1.5, 1.0, 0.5, 0.5], rel=0.05)


def test_one_measurement_moves_a_correction_little(clock):
    corrections = CostCorrections()
    see(clock, corrections, "draft_scale", 0, 100.0)
    assert 1.0 < corrections.scales["draft_scale"].item() < 1.12
    see(clock, corrections, "plain_scale", 5, 100.0)
    assert 1.0 < corrections.scales["plain_scale"].max() < 1.12


def test_a_model_of_one_layer(clock):
    def forward(rows: int, layers: int) -> None:
        clock.now += 0.1 * rows * layers

    assert measure_pass_costs(forward, 1, 2, lambda: None).layer == pytest.approx([0.1, 0.2])


# A long context.

READING = PassCosts(
    (1.0, 8.0),
    (1.0, 1.0),
    (0.5, 0.5),
    context_rows=(1.0, 8.0),
    context=(1e-3, 0.5e-3),
    context_query=(0.25, 0.25),
)
LONG = np.array([1000, 3000])


def test_context_costs_are_what_more_tokens_add(clock):
    def forward(rows: int, tokens: int, queries: int) -> None:
        clock.now += 7.0 + 6 * rows * tokens * 1e-3 * (1 + (queries - 1) / 4) / (2 if rows > 1 else 1)

    of = ContextPass(forward, short=16, long=1024, rows=8)
    costs = measure_context_costs(PassCosts((1.0,), (1.0,), (0.0,)), of, 6)
    assert costs.context_rows == (1.0, 8.0)
    assert costs.context == pytest.approx([1e-3, 0.5e-3])
    assert costs.context_query == pytest.approx([0.25, 0.25])
    one = measure_context_costs(PassCosts((1.0,), (1.0,), (0.0,)), of, 6, several=False)
    assert one.context == pytest.approx(costs.context)
    assert one.context_query == (0.0, 0.0)
    assert measure_context_costs(costs, None, 6) is costs


def test_steps_read_all_and_drafts_what_they_see():
    batch, cut = READING.over(LONG), READING.over(LONG, 1000)
    per_token = 2 * np.interp(2, (1, 8), (1e-3, 0.5e-3))  # two rows
    assert float(batch.plain(2, 10)) == pytest.approx(0.5 + 10 * (1 + 2000 * per_token))
    assert float(batch.verify(10, 10)) == pytest.approx(0.5 + 10 * (1 + 2000 * per_token * 2))  # five each
    for costs, tokens in ((batch, 2000), (cut, 1000)):
        assert float(costs.draft_step(2, 6)) == pytest.approx(0.5 + 6 * (1 + tokens * per_token))
    assert cut.verify(10, 10) == batch.verify(10, 10)
    assert READING.over(np.empty(0, dtype=np.int64)) is READING
    assert float(READING.plain(2, 10)) == 10.5


def test_a_pass_with_a_window_runs_the_target_besides():
    few = READING.over(np.array([100]), 1000)
    assert few.optimize(1, 4, 2) == READING.over(np.array([100])).optimize(1, 4, 2)
    cut = READING.over(np.array([3000]), 1000)
    columns = np.array([1, 2, 3, 3])
    seen = 1000 * columns * np.interp(columns, (1, 8), (1e-3, 0.5e-3))
    assert cut.optimize(1, 4, 2) == pytest.approx(0.5 + 4 + seen.sum() + 0.5 + 4 * (1 + 3000 * 1e-3))


def test_passes_that_are_called_module_by_module():
    """Where drafts are replayed; the target of its own weights, too."""
    replayed = PassCosts((1.0,), (1.0,), (0.5,))
    called = replace(replayed, pass_layer=(5.0,), pass_fixed=(2.0,))
    assert called.draft_step(1, 4) == replayed.draft_step(1, 4)
    assert replayed.optimize(1, 4, 2) == 0.5 + 4
    assert called.optimize(1, 4, 2) == 2.0 + 4 * 5
