"""Costs of passes: measured with a clock that the test sets."""

import pytest
import torch

from clasp_vllm.drafting import timing
from clasp_vllm.drafting.timing import CostCorrections, Mark, measure_pass_costs


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
    assert costs.rows == (1.0, 2.0, 4.0, 8.0, 16.0)
    assert costs.layer == pytest.approx([0.3, 0.4, 0.6, 1.0, 1.8])
    assert costs.besides == pytest.approx([0.51, 0.52, 0.54, 0.58, 0.66])
    assert float(costs.forward(3, 2)) == pytest.approx(0.53 + 2 * 0.5)
    assert float(costs.forward(20, 1)) == pytest.approx(0.7 + 2.2)


def test_corrections_come_to_what_is_seen(clock):
    corrections = CostCorrections()
    for _ in range(100):
        start = Mark(torch.device("cpu"))
        clock.now += 0.3
        corrections.add("verify_scale", 0.2, start, Mark(torch.device("cpu")))
        corrections.settle()
    assert corrections.scales["verify_scale"] == pytest.approx(1.5, rel=1e-3)
    assert corrections.scales["draft_scale"] == 1.0


def test_one_measurement_moves_a_correction_little(clock):
    corrections = CostCorrections()
    start = Mark(torch.device("cpu"))
    clock.now += 100.0
    corrections.add("draft_scale", 0.2, start, Mark(torch.device("cpu")))
    corrections.settle()
    assert 1.0 < corrections.scales["draft_scale"] < 1.1


def test_a_model_of_one_layer(clock):
    def forward(rows: int, layers: int) -> None:
        clock.now += 0.1 * rows * layers

    assert measure_pass_costs(forward, 1, 2, lambda: None).layer == pytest.approx([0.1, 0.2])
