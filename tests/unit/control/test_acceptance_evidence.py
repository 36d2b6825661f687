"""What is learnt of acceptance, from passes and from verification."""

import numpy as np
import torch

from clasp_vllm.control.acceptance import KNOWN, POSITION_GUESS, SPREAD, AcceptanceEvidence
from clasp_vllm.control.early_exit import Confidence
from clasp_vllm.control.planner import Choice
from clasp_vllm.control.verification import UnverifiedDrafts, VerificationOutcomes

BUDGETS = (2, 4, 8, 16)
LONGEST = 4
NONE = np.zeros(1, dtype=np.int64)


def evidence(capacity: int = 4) -> AcceptanceEvidence:
    return AcceptanceEvidence(capacity, BUDGETS, 24, LONGEST)


def verify(learnt: AcceptanceEvidence, slot: int, accepted: int, budget: int = 2) -> None:
    """Drafts of four tokens of which so many are accepted."""
    rejected = np.array([accepted < LONGEST])
    learnt.add_verified(np.array([slot]), budget, NONE, np.array([accepted]), rejected)


def test_the_first_guess_falls_with_the_budget():
    acceptance = evidence().acceptance(np.array([0, 1]))
    assert acceptance.shape == (2, 4, LONGEST)
    assert (np.diff(acceptance, axis=1) < 0).all()


def test_passes_tell_which_budgets_are_worth_trying():
    learnt = evidence()
    for _ in range(100):
        learnt.add_pass(np.array([[True, True, True, False]]))
    acceptance = learnt.acceptance(np.array([0]))[0, :, 0]
    assert (acceptance[:3] > 0.95).all()
    assert acceptance[3] < 0.05


def test_skipping_more_is_never_thought_better():
    learnt = evidence()
    for _ in range(20):
        learnt.add_pass(np.array([[True, False, True, True]]))
    assert (np.diff(learnt.acceptance(np.array([0]))[0], axis=0) <= 0).all()


def test_verification_finds_a_sequences_acceptance():
    """Two sequences whose drafts are accepted with 0.3 and 0.9, whatever the passes say."""
    random, learnt = np.random.default_rng(0), evidence()
    means = []
    for round_ in range(600):
        for slot, alpha in ((0, 0.3), (1, 0.9)):
            tokens = random.random(4) < alpha
            verify(learnt, slot, 4 if tokens.all() else int(np.argmin(tokens)))
        if round_ >= 100:
            means.append(learnt.acceptance(np.array([0, 1]))[:, 2, 0])
    low, high = np.mean(means, axis=0)
    assert abs(low - 0.3) < 0.05
    assert abs(high - 0.9) < 0.05


def test_optimism_is_for_what_is_not_known():
    learnt, slots = evidence(), np.array([0, 1])
    for _ in range(20):
        verify(learnt, 0, 2)
    before, optimistic = learnt.acceptance(slots), learnt.acceptance(slots, optimism=1.0)
    gained = np.log(optimistic / (1 - optimistic)) - np.log(before / (1 - before))
    assert np.allclose(gained[1], (SPREAD - KNOWN) ** 0.5)
    assert (gained[0] > 0).all()
    assert (gained[0] < 0.5).all()


def test_a_few_tokens_tell_a_new_sequence_from_the_mean():
    """After two rounds without one token accepted it is thought much worse than before."""
    learnt = evidence()
    learnt.drafts.mean[:] = 1.0
    learnt.start(0)
    before = learnt.acceptance(np.array([0]))[0, 1, 0]
    for _ in range(2):
        verify(learnt, 0, 0, budget=1)
    assert learnt.acceptance(np.array([0]))[0, 1, 0] < before - 0.15


def test_what_is_known_well_moves_slowly():
    learnt = evidence()
    for _ in range(100):
        for accepted in (0, 4):
            verify(learnt, 0, accepted)
    known = learnt.acceptance(np.array([0]))[0, 2, 0]
    verify(learnt, 0, 0)
    assert abs(learnt.acceptance(np.array([0]))[0, 2, 0] - known) < 0.1


def test_acceptance_by_position():
    """First tokens always accepted, third ones hardly ever; a fourth was seen twenty times."""
    random, learnt = np.random.default_rng(0), evidence()
    for _ in range(400):
        verify(learnt, 0, 2 + int(random.random() < 0.1) * int(random.random() < 0.5))
    first, _, third, fourth = learnt.acceptance(np.array([0]))[0, 2]
    assert first > 0.85
    assert third < 0.3
    assert fourth < 0.4
    assert learnt.acceptance(np.array([1]))[0, 2, 2] < learnt.acceptance(np.array([1]))[0, 2, 0]


def test_positions_not_seen_are_taken_for_those_before():
    learnt = evidence()
    for _ in range(300):
        learnt.add_verified(np.array([0]), 2, NONE, np.array([1]), np.array([True]))
    positions = learnt.positions()[0]
    assert positions[0] == 0
    assert positions[1] < -1
    assert positions[2] == positions[3] == positions[1]


def test_sampling_sequences_have_positions_of_their_own():
    learnt = evidence()
    learnt.start(1, sampling=True)
    for _ in range(100):
        verify(learnt, 1, 1)
    greedy, sampling = learnt.positions()
    assert greedy[0] == 0
    assert (greedy[1:] == POSITION_GUESS).all()
    assert sampling[1] < -1


def test_new_sequences_inherit_the_mean_of_their_kind():
    learnt = evidence()
    learnt.start(1, sampling=True)
    for _ in range(50):
        verify(learnt, 0, 4, budget=1)
        verify(learnt, 1, 0, budget=1)
    learnt.start(2)
    learnt.start(3, sampling=True)
    greedy, sampled = learnt.acceptance(np.array([2, 3]))[:, 1, 0]
    assert greedy > evidence().acceptance(np.array([0]))[0, 1, 0] > sampled


def test_the_mean_holds_still_however_many_there_are():
    """Waves of requests that start together, each from what the last have shown."""
    for count in (1, 8, 64):
        learnt, random = evidence(count), np.random.default_rng(0)
        slots, starts = np.arange(count), []
        for _ in range(max(12, 200 // count)):
            for slot in slots:
                learnt.start(slot)
            starts.append(float(learnt.acceptance(slots)[:, 2, 0].mean()))
            for _ in range(40):
                tokens = random.random((count, 4)) < 0.6
                accepted = np.where(tokens.all(1), 4, tokens.argmin(1))
                first = np.zeros(count, dtype=np.int64)
                learnt.add_verified(slots, 2, first, accepted, accepted < 4)
        assert abs(np.mean(starts[-5:]) - 0.6) < 0.1
        assert np.ptp(starts[-5:]) < 0.3


def test_matches_start_lower_where_tokens_are_drawn():
    learnt = evidence()
    learnt.start(1, sampling=True)
    greedy, sampled = learnt.ngram_acceptance(np.array([0, 1]))
    assert greedy > sampled + 0.1
    for _ in range(50):
        learnt.add_ngrams(np.array([1]), np.array([4]), np.array([False]))
    assert learnt.ngram_acceptance(np.array([1]))[0] > 0.8
    for _ in range(20_000):
        learnt.forget()
    assert np.allclose(learnt.ngram_acceptance(np.array([0, 1])), [greedy, sampled])


def test_what_the_context_offers_has_an_acceptance_of_its_own():
    learnt = evidence()
    for _ in range(50):
        learnt.add_ngrams(np.array([0, 1]), np.array([4, 0]), np.array([False, True]))
    learnt.start(2)
    good, bad, new = learnt.ngram_acceptance(np.array([0, 1, 2]))
    assert good > 0.9
    assert bad < 0.2
    assert bad < new < good
    assert (learnt.drafts.offset == 0).all()


def outcome(
    lengths, certain, verified, rejected, here=("a", "b"), limit: int = 4, confidence=None, drafted=None
) -> tuple[list, list]:
    """What comes of drafts for a and b: the calls of add_verified and add_lengths, and of Confidence.add."""
    calls: list = []
    sure: list = []

    class Recorder:
        kind = np.zeros(8, dtype=np.int64)

        def add_ngrams(self, slots, accepted, rejected):
            pass

        def add_verified(self, slots, budget, first, accepted, rejected, context, cut):
            calls.append((slots.tolist(), first.tolist(), accepted.tolist(), rejected.tolist()))

        def add_lengths(self, lengths, limits, accepted):
            calls.append((lengths.tolist(), limits.tolist()))

        def add(self, kinds, confidence, won, seen):
            sure.append((won.tolist(), seen.tolist()))

    outcomes = VerificationOutcomes(Recorder(), Recorder(), 8)
    lengths = torch.tensor(lengths)
    choice, limits = Choice(1, limit), np.full(2, limit)
    if confidence is not None:
        confidence = torch.tensor(confidence)
    looked_up = np.zeros(2, dtype=bool)
    outcomes.remember(
        UnverifiedDrafts(
            ["a", "b"],
            np.array([5, 7]),
            looked_up,
            np.array(certain),
            lengths,
            drafted,
            limits,
            confidence,
            choice,
        )
    )
    outcomes.verified(list(here), np.array(verified), None if rejected is None else torch.tensor(rejected))
    return calls, sure


def test_accepted_and_rejected_tokens():
    """The second row stopped early after two tokens, both accepted."""
    calls, _ = outcome([4, 2], [False, False], [4, 2], [1, 0])
    assert calls[0] == ([5, 7], [0, 0], [3, 2], [True, False])
    assert calls[1] == ([4, 2], [4, 4])


def test_where_rows_go_on_together_what_they_drafted_counts():
    """Both stopped after a token, but the batch went on to the third, of which the second row got two."""
    calls, _ = outcome([1, 1], [False, False], [4, 4], [1, 2], drafted=np.array([3, 3]))
    assert calls[0] == ([5, 7], [0, 0], [3, 2], [False, True])
    assert calls[1] == ([1, 1], [4, 4])


def test_a_full_draft_says_nothing_of_further_tokens():
    assert outcome([4, 4], [False, False], [4, 4], [0, 0])[0][0] == ([5, 7], [0, 0], [4, 4], [False, False])


def test_a_certain_token_is_no_evidence():
    assert outcome([4, 4], [True, False], [4, 4], [3, 4])[0][0] == ([5, 7], [1, 0], [1, 0], [True, True])
    assert outcome([1, 1], [True, False], [1, 1], [0, 0])[0][0] == ([5, 7], [1, 0], [1, 1], [False, False])
    learnt = evidence()
    learnt.add_verified(np.array([0]), 2, np.array([1]), np.array([0]), np.array([True]))
    assert learnt.drafts.offset[0] == 0  # a near-tie


def test_tokens_that_only_fill_up_are_no_evidence():
    """Verified in full length although drafting stopped after one token."""
    call = outcome([1, 4], [False, False], [4, 4], [3, 2])[0][0]
    assert call == ([5, 7], [0, 0], [1, 2], [False, True])


def test_the_engine_may_have_cut_drafts_or_lost_requests():
    assert outcome([4, 4], [False, False], [2, 0], [0, 0])[0][0][2:] == ([2, 0], [False, False])
    assert outcome([4, 4], [False, False], [7, 4], [0, 1], here=("new", "b"))[0][0][2:] == ([3], [True])
    assert outcome([4, 4], [False, False], [0, 0], None)[0] == []
    assert outcome([4, 4], [False, False], [9, 4], [0, 1])[0][0][2:] == ([3], [True])  # preempted and back


def test_confidence_is_compared_with_what_became_of_the_tokens():
    """Of the first row two of three are accepted, the first of the second is certain, its end unknown."""
    confidence = [[0.9, 0.8, 0.7, 0.6]] * 2
    _, sure = outcome([3, 2], [False, True], [3, 2], [1, 0], confidence=confidence)
    won, seen = sure[0]
    assert seen == [[True, True, True, False], [False, True, False, False]]
    assert won[0][:3] == [True, True, False]
    assert won[1][1]


def test_how_often_sure_tokens_are_accepted():
    random, learnt = np.random.default_rng(0), Confidence()
    for _ in range(300):
        confidence = random.choice([0.55, 0.99], (2, 3))
        won = random.random((2, 3)) < np.where(confidence > 0.9, 0.9, 0.2)
        learnt.add(
            np.array([0, 1]), confidence, won & (np.arange(2) == 0)[:, None], np.ones((2, 3), dtype=bool)
        )
    unsure, sure = learnt.accepted[0][[6, -1]]
    assert abs(unsure - 0.2) < 0.1
    assert abs(sure - 0.9) < 0.1
    assert (learnt.accepted[1][[6, -1]] < 0.1).all()  # sampling requests, of which none was


def test_many_tokens_at_once_do_not_overshoot():
    """More in one step than the averages remember."""
    confidence, learnt = Confidence(), evidence()
    many, wide = np.zeros(400, dtype=np.int64), np.full((400, LONGEST), 0.99)
    for won in (True, False, True):
        confidence.add(many, wide, np.full(wide.shape, won), np.ones(wide.shape, dtype=bool))
        learnt.add_lengths(many + (LONGEST if won else 1), many + LONGEST, many + 1)
        assert ((confidence.accepted >= 0) & (confidence.accepted <= 1)).all()
        assert ((learnt.continuation_prob >= 0) & (learnt.continuation_prob <= 1)).all()


def test_drafting_that_stops_early_is_expected_to():
    """Three of four drafts end after the first token; none of the others before the fourth.

    Of those whose first token is right two of three go on.
    """
    learnt = evidence()
    for _ in range(500):
        learnt.add_lengths(np.array([1, 1, 1, 4]), np.full(4, 4), np.array([0, 1, 0, 2]))
        learnt.add_lengths(np.array([4]), np.array([4]), np.array([1]))
    first, second, third, _ = learnt.continuation_prob[0]
    assert abs(learnt.continuation_prob[1, 0] - 2 / 3) < 0.05
    assert abs(first - 0.4) < 0.05
    assert second > 0.95
    assert third > 0.95
