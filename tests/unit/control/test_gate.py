"""The states of the gate, as the table at its head says."""

import pytest

from clasp_vllm.control.gate import OFF_CHECK, PATIENCE, Gate, State
from clasp_vllm.control.planner import WORTH_IT, Choice

PLAIN = 1.0  # seconds of a plain step


def choice(ratio: float, seconds: float = 2.0) -> Choice:
    return Choice(0, 4, ratio=ratio, seconds=seconds)


GOOD, BAD = choice(WORTH_IT + 0.1), choice(0.5)


def test_it_speculates_where_that_pays_and_stops_where_not():
    gate = Gate(always_on=False)
    assert gate.state is State.OFF
    gate.decide(GOOD, False, PLAIN, 1)
    assert (gate.state, gate.asks, gate.speculating) == (State.SPECULATING, True, True)
    assert gate.opens(4)
    gate.decide(BAD, True, PLAIN, 1)
    assert (gate.state, gate.asks, gate.speculating) == (State.TRYING, True, True)
    gate.decide(BAD, False, PLAIN, 1)
    assert (gate.state, gate.asks, gate.speculating) == (State.OFF, False, False)
    assert not gate.opens(4)


@pytest.mark.parametrize("room", [0, 3])
def test_a_probe_is_one_round_and_waits_for_room(room):
    gate = Gate(always_on=False)
    gate.probes.due = lambda *_: True
    gate.decide(BAD, False, PLAIN, 1)
    assert (gate.state, gate.asks) == (State.PROBING, True)
    gate.probes.due = lambda *_: False
    for _ in range(room):
        assert not gate.opens(0)
        gate.decide(BAD, False, PLAIN, 1)
        assert (gate.state, gate.asks) == (State.PROBING, False)
    assert gate.opens(4)
    gate.decide(BAD, False, PLAIN, 1)
    assert gate.state is State.OFF


def test_a_probe_gives_up():
    gate = Gate(always_on=False)
    gate.probes.due = lambda *_: True
    for _ in range(PATIENCE):
        assert gate.state in (State.OFF, State.PROBING)
        gate.decide(BAD, False, PLAIN, 1)
        assert not gate.opens(0)
    assert gate.state is State.OFF


def test_no_round_may_lose_more_than_the_budget_holds():
    gate = Gate(always_on=False)
    gate.budget.balance = 0.5
    gate.decide(GOOD, False, PLAIN, 1)
    assert gate.state is State.OFF
    shared = Gate(always_on=False, shared=True)
    shared.budget.balance = 0.0  # rank 0 says otherwise
    shared.decide(GOOD, False, PLAIN, 1)
    assert shared.state is State.SPECULATING


def test_a_large_batch_begins_what_it_may_lose_for_all():
    gate = Gate(always_on=False)
    gate.budget.balance = 3.0
    gate.decide(choice(2.0, seconds=2.0), False, PLAIN, 4)  # it may lose a step of four
    assert gate.state is State.OFF
    gate.decide(choice(2.0, seconds=1.5), False, PLAIN, 4)
    assert gate.state is State.SPECULATING


def test_always_on():
    gate = Gate(always_on=True)
    gate.budget.balance = 0.0
    gate.decide(BAD, False, PLAIN, 1)
    assert gate.state is State.SPECULATING
    assert gate.opens(4)


def test_off_needs_a_decision_now_and_then_and_when_the_batch_changes():
    gate = Gate(always_on=False)
    gate.probes.due = lambda *_: False
    assert gate.due(4, 4)
    gate.decide(BAD, False, PLAIN, 1)
    assert not gate.opens(4)
    assert gate.may_idle
    steps = 0
    while gate.may_idle:
        gate.idle()
        steps += 1
    assert steps == OFF_CHECK - 1
    assert gate.take_idled() == steps
    assert gate.due(4, 4)
    gate.opens(4)
    assert not gate.due(4, 5)  # one new of four
    assert gate.due(4, 6)
    gate.opens(4)
    assert gate.due(6, 6)
