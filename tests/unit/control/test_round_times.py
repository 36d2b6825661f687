"""What rounds take: what is corrected by it, and what it does to the loss budget."""

import numpy as np
import pytest
import torch

from clasp_vllm.control.costs import SIZES, CostCorrections, PassCosts
from clasp_vllm.control.loss_budget import START, LossBudget
from clasp_vllm.control.round_times import PAUSE, RoundTimes
from clasp_vllm.device import DeviceEvent

LAYERS = 4
COSTS = PassCosts(tuple(map(float, SIZES)), (0.25,) * len(SIZES), (0.0,) * len(SIZES))  # a step takes 1 s


class At(DeviceEvent):
    """An event at a given second."""

    def __init__(self, second: float) -> None:
        super().__init__(torch.device("cpu"))
        self._time = second


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The seconds at which the next events will be."""
    seconds: list[float] = []
    monkeypatch.setattr("clasp_vllm.control.round_times.DeviceEvent", lambda device: At(seconds.pop(0)))
    return seconds


def settled(times: RoundTimes, budget: LossBudget) -> float:
    before = budget.balance
    others = LossBudget()
    times.settle(COSTS, budget, others)
    assert others.balance == START
    return budget.balance - before


def test_a_plain_step_corrects_what_such_steps_cost(clock):
    corrections = CostCorrections()
    times = RoundTimes(LAYERS, corrections)
    times.round_ended(["a", "b"], At(10.0))
    clock.append(11.5)
    times.engine_step(["a", "b"], np.array([1, 1]), None, COSTS)
    times.verified()
    assert settled(times, LossBudget()) == 0.0
    assert corrections.scales["plain_scale"][1] > 1.0


def test_a_round_is_accounted_for(clock):
    """Half a second of drafting, then 1.5 for a verification that makes three tokens of one request."""
    corrections, budget = CostCorrections(), LossBudget()
    times = RoundTimes(LAYERS, corrections)
    times.add_drafting(1, (At(9.5), At(9.5), At(10.0)), 0.5, 0.0, 0)
    times.round_ended(["a"], At(10.0))
    clock.append(11.5)
    times.engine_step(["a"], np.array([5]), torch.tensor([2]), COSTS)
    times.verified()
    assert settled(times, budget) == pytest.approx(-0.5 + 3 - 1.5)
    assert corrections.scales["draft_scale"][0] == pytest.approx(1.0)
    assert corrections.scales["verify_scale"][SIZES.index(4)] > 1.0


def test_a_pause_of_the_machine_counts_for_little(clock):
    """A minute while a draft is made, and another while it is verified."""
    times, budget = RoundTimes(LAYERS, CostCorrections()), LossBudget()
    times.add_drafting(1, (At(0.0), At(0.0), At(60.0)), 0.5, 0.0, 0)
    times.round_ended(["a"], At(60.0))
    clock.append(120.0)
    times.engine_step(["a"], np.array([5]), torch.tensor([2]), COSTS)
    times.verified()
    assert settled(times, budget) == pytest.approx(-PAUSE * 0.5 + 3 - PAUSE * 1.0)


def test_what_lookups_gain_is_theirs(clock):
    times, budget, match_budget = RoundTimes(LAYERS, CostCorrections()), LossBudget(), LossBudget()
    times.round_ended(["a"], At(10.0), matches=True)
    clock.append(11.5)
    times.engine_step(["a"], np.array([5]), torch.tensor([2]), COSTS)
    times.verified()
    times.settle(COSTS, budget, match_budget)
    assert budget.balance == START
    assert match_budget.balance == pytest.approx(START + 3 - 1.5)


@pytest.mark.parametrize("request_ids", [["a", "new"], ["b"]])
def test_a_step_with_other_requests_says_nothing(clock, request_ids):
    corrections = CostCorrections()
    times = RoundTimes(LAYERS, corrections)
    times.round_ended(["a"], At(10.0))
    times.engine_step(request_ids, np.ones(len(request_ids), dtype=int), None, COSTS)
    times.verified()
    assert settled(times, LossBudget()) == 0.0
    assert (corrections.scales["plain_scale"] == 1.0).all()


def test_the_last_of_idle_steps_is_timed(clock):
    corrections = CostCorrections()
    times = RoundTimes(LAYERS, corrections)
    times.round_ended(["a"], At(10.0))
    times.idled(last=False)
    clock.append(20.0)
    times.idled(last=True)
    clock.append(21.5)
    times.engine_step(["a"], np.array([1]), None, COSTS)
    settled(times, LossBudget())
    assert corrections.scales["plain_scale"][0] > 1.0
