"""What is learnt of acceptance, from passes and from verification."""

import numpy as np
import torch

from clasp_vllm.drafting.acceptance import AcceptanceEvidence
from clasp_vllm.drafting.outcomes import Drafts, Outcomes
from clasp_vllm.skipping.controller import Choice

BUDGETS = (2, 4, 8, 16)
NOT_SAMPLING = np.zeros(1, dtype=bool)


def evidence() -> AcceptanceEvidence:
    return AcceptanceEvidence(4, BUDGETS, 24)


def test_the_first_guess_falls_with_the_budget():
    found = evidence().acceptance(np.array([0, 1]))
    assert found.shape == (2, 2, 4)
    assert (np.diff(found, axis=2) < 0).all()


def test_passes_tell_which_budgets_are_worth_trying():
    learnt = evidence()
    for _ in range(100):
        learnt.add_pass(np.array([[True, True, True, False]]))
    found = learnt.acceptance(np.array([0]))[0, 0]
    assert (found[:3] > 0.95).all()
    assert found[3] < 0.05


def test_skipping_more_is_never_thought_better():
    learnt = evidence()
    for _ in range(20):
        learnt.add_pass(np.array([[True, False, True, True]]))
    assert (np.diff(learnt.acceptance(np.array([0]))[0, 0]) <= 0).all()


def test_verification_finds_a_sequences_acceptance():
    """Two sequences whose drafts are accepted with 0.3 and 0.9, whatever the passes say."""
    random, learnt = np.random.default_rng(0), evidence()
    means = []
    for round_ in range(600):
        for slot, alpha in ((0, 0.3), (1, 0.9)):
            tokens = random.random(4) < alpha
            accepted = int(np.argmin(tokens)) if not tokens.all() else 4
            learnt.add_verified(
                np.array([slot]), NOT_SAMPLING, 2, False, np.array([accepted]), np.array([accepted < 4])
            )
        if round_ >= 100:
            means.append(learnt.acceptance(np.array([0, 1]))[0, :, 2])
    low, high = np.mean(means, axis=0)
    assert abs(low - 0.3) < 0.05
    assert abs(high - 0.9) < 0.05


def test_new_sequences_inherit_the_mean_of_their_kind():
    learnt = evidence()
    for _ in range(50):
        learnt.add_verified(np.array([0]), NOT_SAMPLING, 1, False, np.array([4]), np.array([False]))
        learnt.add_verified(np.array([1]), ~NOT_SAMPLING, 1, False, np.array([0]), np.array([True]))
    learnt.start(2)
    learnt.start(3, sampling=True)
    greedy, sampled = learnt.acceptance(np.array([2, 3]))[0, :, 1]
    assert greedy > evidence().acceptance(np.array([0]))[0, 0, 1] > sampled


def test_the_mean_holds_still_however_many_there_are():
    """Waves of requests that start together, each from what the last have shown."""
    for count in (1, 8, 64):
        learnt, random = AcceptanceEvidence(count, BUDGETS, 24), np.random.default_rng(0)
        slots, starts = np.arange(count), []
        for _ in range(max(12, 200 // count)):
            for slot in slots:
                learnt.start(slot)
            starts.append(float(learnt.acceptance(slots)[0, :, 2].mean()))
            for _ in range(40):
                tokens = random.random((count, 4)) < 0.6
                accepted = np.where(tokens.all(1), 4, tokens.argmin(1))
                learnt.add_verified(slots, np.zeros(count, dtype=bool), 2, False, accepted, accepted < 4)
        assert abs(np.mean(starts[-5:]) - 0.6) < 0.1
        assert np.ptp(starts[-5:]) < 0.2


def test_a_shared_masks_acceptance_is_its_own():
    learnt = evidence()
    for _ in range(200):
        learnt.add_verified(np.array([0]), NOT_SAMPLING, 1, False, np.array([3]), np.array([False]))
        learnt.add_verified(np.array([0]), NOT_SAMPLING, 1, True, np.array([0]), np.array([True]))
    own, shared = learnt.acceptance(np.array([0]))[:, 0, 1]
    assert own > shared


def test_what_the_context_offers_has_an_acceptance_of_its_own():
    learnt = evidence()
    for _ in range(50):
        learnt.add_ngrams(np.array([0, 1]), np.array([4, 0]), np.array([False, True]))
    learnt.start(2)
    good, bad, new = learnt.ngram_acceptance(np.array([0, 1, 2]))
    assert good > 0.9
    assert bad < 0.2
    assert bad < new < good
    assert (learnt.offset == 0).all()


def outcome(lengths, certain, verified, rejected, here=("a", "b"), limit: int = 4) -> list:
    """What ``Outcomes`` makes of drafts for a and b: the calls of add_verified and add_lengths."""
    calls: list = []

    class Recorder:
        def add_ngrams(self, slots, accepted, refused):
            pass

        def add_verified(self, slots, sampling, budget, shared, accepted, refused):
            calls.append((slots.tolist(), accepted.tolist(), refused.tolist()))

        def add_lengths(self, went_on, stopped):
            calls.append((went_on, stopped))

    outcomes = Outcomes(Recorder(), 8)
    lengths = torch.tensor(lengths)
    choice = Choice(1, limit, False)
    flags = np.zeros(2, dtype=bool), np.zeros(2, dtype=bool), np.array(certain)
    outcomes.drafted(Drafts(["a", "b"], np.array([5, 7]), *flags, lengths, choice))
    outcomes.verified(list(here), np.array(verified), None if rejected is None else torch.tensor(rejected))
    return calls


def test_accepted_and_refused_tokens():
    calls = outcome([4, 2], [False, False], [4, 2], [1, 0])
    assert calls[0] == ([5, 7], [3, 2], [True, False])
    assert calls[1] == (3 + 1, 1)


def test_a_certain_token_is_no_evidence():
    assert outcome([4, 4], [True, False], [4, 4], [4 - 1, 4])[0] == ([5, 7], [0, 0], [True, True])
    assert outcome([1, 1], [True, False], [1, 1], [0, 0])[0] == ([5, 7], [0, 1], [False, False])
    assert outcome([4, 4], [True, False], [4, 4], [4, 4])[0] == ([5, 7], [0, 0], [False, True])


def test_tokens_that_only_fill_up_are_no_evidence():
    """Verified in full length although drafting stopped after one token."""
    assert outcome([1, 4], [False, False], [4, 4], [3, 2])[0] == ([5, 7], [1, 2], [False, True])


def test_the_engine_may_have_cut_drafts_or_lost_requests():
    assert outcome([4, 4], [False, False], [2, 0], [0, 0])[0] == ([5, 7], [2, 0], [False, False])
    assert outcome([4, 4], [False, False], [7, 4], [0, 1], here=("new", "b"))[0] == ([7], [3], [True])
    assert outcome([4, 4], [False, False], [0, 0], None) == []
    assert outcome([4, 4], [False, False], [9, 4], [0, 1])[0] == ([7], [3], [True])  # preempted and back


def test_drafting_that_stops_early_is_expected_to():
    learnt = evidence()
    for _ in range(2000):
        learnt.add_lengths(3, 1)
    assert abs(learnt.going_on - 0.75) < 0.05
