"""How often draft tokens are accepted, by budget and by sequence: evidence that costs nothing.

Every optimisation pass ends with one state for each budget. Whether the head makes the same token of
it as of the full model's scores all budgets at once. Verification scores the budget in use, for each
sequence. Both meet in a logistic model: the acceptance of a sequence at a budget is the curve over
budgets, moved by an offset of the sequence that verification corrects. A pass judges masks by the token
they were found on, so its curve is too good; the offsets, of which new sequences inherit the mean, know.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clasp_vllm.skipping.controller import Array

RATE = 0.15  # how far one draft token moves its sequence's offset
OVERALL_RATE = 0.01  # and how far the mean moves to the offsets
SHARING_SCALE = 4.0  # an error of acceptance as one of an offset: 1 / (p (1 - p)) at its least
FORGET_ROUND = 1e-3  # of what may not be in use, each round
FORGET = 1 / 64  # what passes forget of the curve, for each sequence optimised
PRIOR_PASSES = 2.0  # how many the first guess of the curve counts for
LENGTHS_RATE = 0.002  # how far one draft token moves the estimate of drafting going on
LIMIT = 6.0  # of the offsets


class AcceptanceEvidence:
    """Decaying averages, on the host. Sequences go by the slots of the ``SequenceTable``."""

    def __init__(self, capacity: int, skipped: Sequence[int], num_layers: int) -> None:
        """``skipped``: [budgets] the layers that each budget skips, ascending."""
        # A guess, until there is evidence: a token is lost for sure when every layer is skipped.
        self._curve = 0.95 - 0.6 * np.asarray(skipped, dtype=np.float64) / num_layers
        self._trials = PRIOR_PASSES
        self.offset = np.zeros(capacity)
        self.overall = np.zeros(2)  # of greedy and of sampling sequences
        self.sharing = 0.0
        self.going_on = 0.95
        self.ngram_offset = np.zeros(capacity)
        self.ngram_overall = 0.0

    def start(self, slot: int, sampling: bool = False) -> None:
        """A new sequence has got the slot."""
        self.offset[slot] = self.overall[int(sampling)]
        self.ngram_offset[slot] = self.ngram_overall

    def add_pass(self, agree: np.ndarray) -> None:
        """``agree``: [rows, budgets] bool, the budget's state predicts the full model's token."""
        for row in agree.astype(np.float64):
            self._trials = min(self._trials + 1, 1 / FORGET)
            self._curve += (row - self._curve) / self._trials

    def add_verified(
        self,
        slots: np.ndarray,
        sampling: np.ndarray,
        budget: int,
        shared: bool,
        accepted: np.ndarray,
        refused: np.ndarray,
    ) -> None:
        """What verification said of drafts made by skipping.

        Args:
            slots: [rows] int64.
            sampling: [rows] bool.
            budget: the one in use.
            shared: whether a shared mask was.
            accepted: [rows] int64 draft tokens accepted.
            refused: [rows] bool, whether a token was refused after these.
        """
        for kind in (False, True):
            rows = sampling == kind
            if not rows.any():
                continue
            expected = self.acceptance(slots[rows])[int(shared), :, budget]
            error = _error(expected, accepted[rows], refused[rows])
            self.offset[slots[rows]] = (self.offset[slots[rows]] + RATE * error).clip(-LIMIT, LIMIT)
            tokens = int((accepted + refused)[rows].sum())
            self.overall[int(kind)] += _share(OVERALL_RATE, tokens) * (
                self.offset[slots[rows]].mean() - self.overall[int(kind)]
            )
            if shared and tokens:
                change = _share(OVERALL_RATE, tokens) * error.sum() / tokens
                self.sharing = min(max(self.sharing + SHARING_SCALE * change, -LIMIT), 1.0)

    def add_ngrams(self, slots: np.ndarray, accepted: np.ndarray, refused: np.ndarray) -> None:
        """What verification said of n-grams of the context; arguments as above."""
        if not len(slots):
            return
        error = _error(self.ngram_acceptance(slots), accepted, refused)
        self.ngram_offset[slots] = (self.ngram_offset[slots] + RATE * error).clip(-LIMIT, LIMIT)
        share = _share(OVERALL_RATE, int((accepted + refused).sum()))
        self.ngram_overall += share * float(self.ngram_offset[slots].mean() - self.ngram_overall)

    def forget(self) -> None:
        """Count a round: what is not in use is not tried either, so verdicts on it do not last for ever."""
        self.sharing *= 1 - FORGET_ROUND
        self.ngram_overall *= 1 - FORGET_ROUND
        self.ngram_offset *= 1 - FORGET_ROUND

    def ngram_acceptance(self, slots: np.ndarray) -> Array:
        """[rows], of a token of an n-gram of the context."""
        return _probability(self.ngram_offset[slots])

    def add_lengths(self, went_on: int, stopped: int) -> None:
        """Of draft tokens that were not the last allowed, how many drafting went on after."""
        tokens = went_on + stopped
        if tokens:
            self.going_on += _share(LENGTHS_RATE, tokens) * (went_on / tokens - self.going_on)

    def acceptance(self, slots: np.ndarray) -> Array:
        """[2, rows, budgets]: of a draft token, with each sequence's own mask and with a shared one."""
        curve = np.minimum.accumulate(np.clip(self._curve, 0.02, 0.98))  # skipping more is never better
        own = np.log(curve / (1 - curve)) + self.offset[slots, None]
        return _probability(np.stack((own, own + self.sharing)))


def _probability(logit: Array) -> Array:
    found: Array = 1 / (1 + np.exp(-logit))
    return found


def _error(expected: Array, accepted: np.ndarray, refused: np.ndarray) -> Array:
    """[rows], of tokens seen and ``expected`` to be accepted: the sum of outcome less expectation."""
    found: Array = accepted * (1 - expected) - refused * expected
    return found


def _share(rate: float, count: int) -> float:
    """What ``count`` observations have of a decaying average of which one has ``rate``."""
    return float(1 - (1 - rate) ** count)
