"""When layers are chosen again, and how many passes the loss budget bears."""

import pytest
from unit.control.test_planner import COSTS, NUM_LAYERS, decide

from clasp_vllm.control.pass_schedule import INTERVALS, PassSchedule

BUDGET = 16


def schedule(interval: int | None = None) -> PassSchedule:
    return PassSchedule(interval, NUM_LAYERS, BUDGET, capacity=8)


def test_passes_take_their_share_of_the_time():
    one, eight = decide(0.8, 1), decide(0.8, 8)
    passes = schedule()
    every = passes.space_out(COSTS, one, 1, 8.0)
    assert INTERVALS[0] <= every <= INTERVALS[1]
    assert passes.interval == every
    assert passes.space_out(COSTS, eight, 8, 8.0) > every
    dear = COSTS.scaled({"verify_scale": 1.0, "draft_scale": 1.0, "pass_scale": 3.0})
    assert passes.space_out(dear, one, 1, 8.0) > every
    assert schedule(interval=5).space_out(COSTS, one, 1, 8.0) == 5


@pytest.mark.parametrize("needed", [True, False])
def test_as_many_as_the_budget_bears(needed):
    choice, seen = decide(0.8, 4), []

    def bears(some: int):
        most = choice.seconds + COSTS.optimize(some, NUM_LAYERS, BUDGET) if some else choice.seconds

        def affords(charged) -> bool:
            seen.append(charged.seconds)
            return charged.seconds <= most

        return affords

    passes = schedule()
    for some in (3, 1):
        charged = passes.with_passes(choice, 4, needed, COSTS, bears(some))
        assert passes.most == some
        assert charged.seconds == choice.seconds + COSTS.optimize(some, NUM_LAYERS, BUDGET)
    charged = passes.with_passes(choice, 4, needed, COSTS, bears(0))
    assert passes.most == int(needed)  # and it is for the gate to say no
    assert charged.seconds > choice.seconds if needed else charged == choice
    assert passes.with_passes(choice, 0, False, COSTS, bears(0)) == choice
