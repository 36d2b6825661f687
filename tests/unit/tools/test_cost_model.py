"""The cost model's arithmetic, and the properties that any such model must have."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clasp_vllm.tools.cost_model import Costs, best_ratio, break_even, expected_tokens

LAYERS = 24


def costs(**changes) -> Costs:
    """A step of 26 ms, of which 24 are the layers'; drafting without overheads."""
    plain = {"batch": 1, "step": {0: 26.0, 8: 26.0}, "layer": 1.0, "draft": 0.0, "head": 2.0, "drafting": 0.0}
    return Costs(**(plain | {"optimize": 30.0} | changes))


def test_by_hand():
    assert expected_tokens(0.5, 2) == 1.75
    assert expected_tokens(1.0, 8) == 9
    # 4 drafts of 12 layers and a verification: 4 * 14 + 26 = 82 for 5 tokens of 26 each.
    assert costs().ratio(5, 4, 4, 12) == pytest.approx(5 * 26 / 82)
    assert costs().ratio(5, 4, 3, 12, optimizations=0.5) == pytest.approx(5 * 26 / (3 * 14 + 26 + 15))
    assert costs(step={0: 20.0, 4: 24.0, 8: 40.0}).verify(6) == pytest.approx(32.0)
    assert costs(step={0: 20.0, 4: 24.0}).verify(8) == pytest.approx(28.0)


def test_skipping_nothing_never_pays():
    assert best_ratio(costs(), 1.0, LAYERS, 8)[0] == pytest.approx(1.0)
    assert best_ratio(costs(), 0.9, LAYERS, 8)[0] < 1
    assert break_even(costs(draft=0.1), LAYERS, 8) is None


@given(layers=st.integers(1, LAYERS - 1), overhead=st.floats(0, 5))
def test_break_even_is_where_the_best_ratio_crosses_one(layers, overhead):
    model = costs(draft=overhead)
    needed = break_even(model, layers, 8)
    if needed is None:
        assert best_ratio(model, 1.0, layers, 8)[0] < 1
    else:
        assert best_ratio(model, needed, layers, 8)[0] == pytest.approx(1.0, abs=1e-3)
        assert best_ratio(model, min(needed + 0.02, 1.0), layers, 8)[0] >= 1.0


@given(alpha=st.floats(0, 1), more=st.floats(0, 1), layers=st.integers(1, LAYERS))
def test_more_acceptance_is_never_slower_and_more_cost_never_faster(alpha, more, layers):
    ratio = best_ratio(costs(), alpha, layers, 8)[0]
    assert best_ratio(costs(), max(alpha, more), layers, 8)[0] >= ratio - 1e-12
    assert best_ratio(costs(drafting=more), alpha, layers, 8)[0] <= ratio + 1e-12
    assert best_ratio(costs(), alpha, max(layers - 1, 0), 8)[0] >= ratio - 1e-12
