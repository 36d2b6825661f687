"""What speculation may lose."""

from hypothesis import given
from hypothesis import strategies as st

from clasp_vllm.control.loss_budget import MOST, SHARE, START, LossBudget


def test_gains_and_losses_in_plain_steps():
    budget = LossBudget()
    budget.charge_drafting(seconds=0.030, plain_seconds=0.010)
    budget.verified(rows=2, tokens=6, seconds=0.012, plain_seconds=0.010)
    assert budget.balance == START - 3 + (3 - 1.2)


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
        budget.step()
        if wanted and budget.balance >= 1.5:
            budget.charge_drafting(seconds=1.5, plain_seconds=1.0)
            budget.verified(rows=1, tokens=1, seconds=1.0, plain_seconds=1.0)
            lost += 1.5
    assert lost <= START + SHARE * len(wants)
