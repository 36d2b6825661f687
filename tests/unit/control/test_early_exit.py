"""When drafting stops, and that rows which go on keep their places."""

import numpy as np
import pytest
import torch

from clasp_vllm.control.early_exit import EDGES, Confidence, FixedExit
from clasp_vllm.drafting.batch import SequenceBatch
from clasp_vllm.drafting.tokens import DraftTokenBuffer

CPU = torch.device("cpu")
NONE = np.zeros(1, dtype=np.int64)


def test_a_threshold_goes_by_one_token():
    assert FixedExit(0.5).stops(torch.tensor([0.4, 0.5, 0.6]), slice(None)).tolist() == [True, False, False]


def test_survival_is_the_product_of_what_was_learnt():
    learnt = Confidence()
    learnt.accepted[0], learnt.accepted[1] = np.linspace(0.1, 0.9, len(EDGES) + 1), 0.5
    rule = learnt.exit(np.array([0, 1]), 0.3, CPU)
    assert rule.stops(torch.tensor([1.0, 1.0]), slice(None)).tolist() == [False, False]  # 0.9, 0.5
    assert rule.stops(torch.tensor([1.0, 1.0]), slice(None)).tolist() == [False, True]  # 0.81, 0.25
    assert rule.stops(torch.tensor([0.0]), torch.tensor([0])).tolist() == [True]  # 0.081
    assert not learnt.exit(np.array([0]), 0.0, CPU).stops(torch.zeros(1), slice(None)).any()


@pytest.mark.parametrize("confidence", [0.0, 0.05, 0.3, 0.98, 1.0])
def test_what_is_learnt_and_what_is_asked_use_the_same_bins(confidence):
    learnt, one = Confidence(), np.array([[True]])
    learnt.accepted[:] = 0.5
    for _ in range(500):
        learnt.add(np.zeros(1, dtype=np.int64), np.array([[confidence]], dtype=np.float32), one, one)
    rule = learnt.exit(np.zeros(1, dtype=np.int64), 0.9, CPU)
    assert not rule.stops(torch.tensor([confidence]), slice(None))[0]
    assert (np.abs(learnt.accepted[0] - 0.5) < 1e-9).sum() == len(EDGES)  # but for one


def test_unsure_drafts_of_sampling_sequences_are_tried():
    """A token drawn from a flat distribution is accepted if the target's is flat, until evidence says no."""
    learnt, kinds, one = Confidence(), np.array([0, 1]), np.ones((2, 1), dtype=bool)
    unsure = torch.tensor([0.2, 0.2])
    assert learnt.exit(kinds, 0.5, CPU).stops(unsure, slice(None)).tolist() == [True, False]
    for _ in range(10):
        learnt.add(kinds, np.full((2, 1), 0.2, dtype=np.float32), ~one, one)
    assert learnt.exit(kinds, 0.5, CPU).stops(unsure, slice(None)).all()


def batch(rows: int) -> SequenceBatch:
    table = torch.arange(rows * 2, dtype=torch.int32).view(rows, 2)
    tokens, positions = torch.arange(rows) + 100, torch.arange(rows) * 10
    return SequenceBatch([f"r{row}" for row in range(rows)], tokens, positions, table, positions.int() + 1)


def test_rows_that_stop_leave_and_the_others_keep_their_places():
    draft = DraftTokenBuffer(3, 3, FixedExit(0.5), True, CPU)
    draft.take(np.arange(3), torch.tensor([1, 2, 3]), torch.tensor([0.9, 0.1, 0.9]), np.arange(3))
    assert draft.left.tolist() == [0, 2]
    on = draft.following(batch(3))
    assert on.request_ids == ["r0", "r2"]
    assert on.tokens.tolist() == [1, 3]
    assert on.positions.tolist() == [1, 21]
    assert on.max_lengths.tolist() == [2, 22]
    draft.take(np.array([2]), torch.tensor([4]), torch.tensor([0.9]), np.array([3]))  # one gets ahead
    on = draft.following(batch(3))
    assert on.tokens.tolist() == [1, 4]
    assert on.positions.tolist() == [1, 22]
    draft.take(np.array([0, 2]), torch.tensor([5, 6]), torch.tensor([0.9, 0.9]), np.array([4, 5]))
    assert draft.left.tolist() == [0]  # the other is full
    draft.finish()
    assert draft.tokens.tolist() == [[1, 5, 0], [2, 0, 0], [3, 4, 6]]
    assert draft.lengths.tolist() == [2, 1, 3]
    assert draft.drawn.tolist() == [[0, 4, -1], [1, -1, -1], [2, 3, 5]]
    assert draft.confidence[:, 0].tolist() == pytest.approx([0.9, 0.1, 0.9])


def test_where_the_host_is_not_to_know_all_rows_go_on_together():
    draft = DraftTokenBuffer(2, 3, FixedExit(0.5), False, CPU)
    draft.take(draft.left, torch.tensor([1, 2]), torch.tensor([0.9, 0.1]), NONE)
    assert draft.left.tolist() == [0, 1]
    draft.take(draft.left, torch.tensor([3, 4]), torch.tensor([0.1, 0.9]), NONE)
    assert draft.left.size == 0
    assert draft.lengths.tolist() == [2, 1]
    assert draft.tokens.tolist() == [[1, 3, 3], [2, 4, 4]]  # filled up


def test_a_row_stops_after_a_token_that_ends_it():
    draft = DraftTokenBuffer(3, 4, None, True, CPU, [{7, 8}, set(), {9}])
    draft.take(draft.left, torch.tensor([7, 7, 7]), None, NONE)
    assert draft.left.tolist() == [1, 2]
    draft.take(draft.left, torch.tensor([8, 9]), None, NONE)
    assert draft.left.tolist() == [1]
    draft.finish()
    assert draft.lengths.tolist() == [1, 2, 2]
    assert draft.tokens.tolist() == [[7, 0, 0, 0], [7, 8, 0, 0], [7, 9, 0, 0]]


def test_without_a_rule_every_draft_is_as_long_as_it_may_be():
    for drop in (False, True):
        draft = DraftTokenBuffer(2, 2, None, drop, CPU)
        for token in (1, 2):
            draft.take(draft.left, torch.tensor([token, token]), None, NONE)
        draft.finish()
        assert draft.lengths.tolist() == [2, 2]
        assert draft.tokens.tolist() == [[1, 2], [1, 2]]
