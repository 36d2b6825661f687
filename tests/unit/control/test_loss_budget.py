"""What speculation may lose."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clasp_vllm.control.loss_budget import COUNTED, LEAST, MOST, SHARE, START, LossBudget, counted


def test_gains_and_losses_in_plain_steps():
    budget = LossBudget()
    budget.charge_drafting(rows=2, seconds=0.030, plain_seconds=0.010)
    budget.verified(rows=2, tokens=6, seconds=0.012, plain_seconds=0.010)
    assert budget.balance == START + 2 * (-3 + (3 - 1.2))


def test_gains_are_remembered_up_to_a_limit():
    budget = LossBudget()
    for _ in range(100):
        budget.verified(rows=1, tokens=5, seconds=0.01, plain_seconds=0.01)
    assert budget.balance == MOST


@given(st.lists(st.booleans(), max_size=400))
def test_what_is_lost_is_bounded(wants):
    """Rounds that always lose a step and a half, begun whenever somebody wants and the account allows."""
    budget, lost = LossBudget(), 0.0
    for wanted in wants:
        budget.step(rows=1)
        if wanted and budget.balance >= 1.5:
            budget.charge_drafting(rows=1, seconds=1.5, plain_seconds=1.0)
            budget.verified(rows=1, tokens=1, seconds=1.0, plain_seconds=1.0)
            lost += 1.5
    assert lost <= START + SHARE * len(wants)


def test_a_step_counts_for_each_sequence_of_a_batch_up_to_a_few():
    for rows, steps in ((1, 12), (2, 6), (4, 3), (COUNTED, START / COUNTED), (64, START / COUNTED)):
        budget = LossBudget()
        budget.charge_drafting(rows, seconds=steps, plain_seconds=1.0)
        assert budget.balance == 0.0
    assert counted(3) == 3


def test_what_is_used_up_comes_back_with_time():
    budget = LossBudget()
    budget.use_up()
    assert budget.balance == 0.0
    for _ in range(round(1.5 / SHARE)):
        budget.step(rows=1)
    assert budget.balance == pytest.approx(1.5)


def test_a_pause_of_the_machine_is_not_held_against_it_for_long():
    budget = LossBudget()
    budget.verified(rows=4, tokens=8, seconds=5.0, plain_seconds=0.01)
    assert budget.balance == LEAST
    assert -LEAST / SHARE <= 500


def test_one_round_is_possible_in_every_batch():
    """Of a draft step as dear as a plain step, whose verification takes a half more."""
    assert START / COUNTED >= 1.5
