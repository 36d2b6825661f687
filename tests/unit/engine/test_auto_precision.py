"""What ``draft_weights: auto`` expects of a precision."""

import numpy as np
import pytest

from clasp_vllm.engine.auto_precision import expected_ratio


def test_free_drafts_are_as_many_as_can_be():
    assert expected_ratio(1.0, np.ones(9), 0.0) == pytest.approx(9)
    assert expected_ratio(0.5, np.ones(9), 0.0) == pytest.approx(2, abs=0.01)


def test_nothing_is_gained_without_agreement_or_at_full_cost():
    assert expected_ratio(0.0, np.ones(9), 0.1) == 1
    assert expected_ratio(1.0, np.ones(9), 1.0) == 1


def test_verification_of_more_rows_counts():
    """Three drafts of a third of a step, all accepted: 4 tokens for 2 steps, or for 2.5."""
    assert expected_ratio(1.0, np.array([1.0, 1.0, 1.0, 1.0]), 1 / 3) == pytest.approx(2)
    assert expected_ratio(1.0, np.array([1.0, 9.0, 9.0, 1.5]), 1 / 3) == pytest.approx(1.6)
