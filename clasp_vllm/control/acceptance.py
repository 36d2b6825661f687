"""How often draft tokens are accepted: by budget, by sequence and by position. It costs nothing to know.

Every optimisation pass ends with one state for each budget. Whether the head makes the same token of
it as of the target's scores all budgets at once. Verification scores the budget in use, for each
sequence and position. They meet in a logistic model, in which the chance that a token of a draft is
accepted, if those before it were, is the sum, in logits, of

- the curve over budgets. A pass judges masks by the token they were found on, so it is too good;
- an offset of the sequence, which verification corrects, fast at first and more slowly as more of it has
  been seen. New sequences inherit the mean;
- an offset of the token's position in the draft, the same for all: what follows an accepted token is
  not as likely to be accepted as that was;
- an offset of the sequence for each window of context that drafts may attend to instead of all: some text
  needs what is far back, and verification tells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from clasp_vllm.control.costs import Array

Flags = np.ndarray[Any, np.dtype[np.bool_]]

SPREAD = 1.0  # variance of the offsets of sequences, before anything is known of one
DRIFT = 0.005  # what one token adds to it
KNOWN = 0.16  # where it ends up after many tokens
MEAN_RATE = 0.02  # how far one token moves the mean to the offsets
POSITION_SPREAD, POSITION_DRIFT = 0.5, 2e-4  # the same of the offsets of positions
POSITION_GUESS = -0.7  # of all but the first, until there is evidence: 0.84 is followed by 0.70 (benchmarks)
ENOUGH_TOKENS = 16.0  # at a position, for its own offset to count half; else the one before it does
FORGET_ROUND = 1e-3  # of what may not be in use, each round
FORGET = 1 / 64  # what passes forget of the curve, for each sequence optimised
PRIOR_PASSES = 8.0  # how many the first guess of the curve counts for
LENGTHS_MEMORY = 200.0  # tokens that the estimate of drafting going on remembers
LIMIT = 6.0  # of the offsets
# Of n-grams, until there is evidence, for greedy and for sampling sequences: a token that is certain is
# accepted as often as the target draws it.
NGRAM_GUESS = (0.0, -1.0)


class SequenceOffsets:
    """An offset in logits for each sequence, by slot: a filter that knows how sure it is of each.

    One step of Newton's method on the logistic likelihood, with the variance as the prior's.
    """

    def __init__(self, capacity: int, guess: tuple[float, float] = (0.0, 0.0)) -> None:
        """``guess``: the mean of greedy and of sampling sequences, until there is evidence."""
        self.offset = np.zeros(capacity)
        self.variance = np.full(capacity, SPREAD)
        self._guess = np.array(guess)
        self.mean = self._guess.copy()

    def start(self, slot: int, kind: int) -> None:
        """A new sequence has got the slot."""
        self.offset[slot], self.variance[slot] = self.mean[kind], SPREAD

    def forget(self, kinds: np.ndarray, share: float) -> None:
        """Go back to the guess by this share of the way; ``kinds``: [capacity]."""
        self.mean += share * (self._guess - self.mean)
        self.offset += share * (self._guess[kinds] - self.offset)

    def add(
        self,
        slots: np.ndarray,
        kinds: np.ndarray,
        expected: Array,
        won: Flags,
        seen: Flags,
        beside: Array | float = 0.0,
    ) -> None:
        """Take in outcomes: [rows, tokens] each, chances and what became of those ``seen``.

        ``beside``: [rows] variance of other offsets that a surprise may be due to.
        """
        tokens = seen.sum(1)
        error = ((won - expected) * seen).sum(1)
        information = (expected * (1 - expected) * seen).sum(1)
        own = self.variance[slots]
        gain = own / (1 + (own + beside) * information)
        variance = gain * (1 + beside * information)
        self.offset[slots] = (self.offset[slots] + gain * error).clip(-LIMIT, LIMIT)
        self.variance[slots] = np.minimum(variance + DRIFT * tokens, SPREAD)
        for kind in (0, 1):
            rows = kinds == kind
            if rows.any():
                share = 1 - (1 - MEAN_RATE) ** float(tokens[rows].sum())
                self.mean[kind] += share * (self.offset[slots[rows]].mean() - self.mean[kind])


class AcceptanceEvidence:
    """Decaying averages, on the host. Sequences go by the slots of the ``SequenceTable``."""

    def __init__(
        self,
        capacity: int,
        skipped: Sequence[float],
        num_layers: int,
        longest: int,
        windows: Sequence[int] = (),
    ) -> None:
        """
        Args:
            skipped: [budgets] the layers that each budget skips, ascending.
            longest: draft tokens of a round at most.
            windows: tokens of context that drafts may attend to instead of all, descending.
        """
        # A guess, until there is evidence: a token is lost for sure when every layer is skipped.
        self._curve = 0.95 - 0.6 * np.asarray(skipped, dtype=np.float64) / num_layers
        self._trials = PRIOR_PASSES
        self.kind = np.zeros(capacity, dtype=np.int64)  # 1 for sampling sequences
        self.started = 0  # sequences
        self.drafts = SequenceOffsets(capacity)
        self.ngrams = SequenceOffsets(capacity, NGRAM_GUESS)
        self.windows = [SequenceOffsets(capacity, (_window_guess(window),) * 2) for window in windows]
        self._position = np.full((2, longest), POSITION_GUESS)  # by kind
        self._position[:, 0] = 0.0  # and stays
        self._position_variance = np.full((2, longest), POSITION_SPREAD)
        self._position_tokens = np.zeros((2, longest))
        self.continuation_prob = np.full((2, longest), 0.95)  # of all drafts, and of those right so far
        self._lengths = np.ones((2, longest))
        self._steps = np.arange(longest)

    def start(self, slot: int, sampling: bool = False) -> None:
        """A new sequence has got the slot."""
        self.kind[slot] = int(sampling)
        self.started += 1
        for offsets in (self.drafts, self.ngrams, *self.windows):
            offsets.start(slot, int(sampling))

    def add_pass(
        self, agree: Flags, slots: np.ndarray | None = None, context: int = 0, cut: Flags | None = None
    ) -> None:
        """What an optimisation pass shows of the curve.

        Args:
            agree: [rows, budgets], the budget's state predicts the target's token.
            slots: [rows] int64; None: all attended to everything.
            context, cut: see ``add_verified``.
        """
        lost = np.zeros(len(agree)) if slots is None else self._lost(slots, context, cut)
        for row, less in zip(agree.astype(np.float64), lost, strict=True):
            self._trials = min(self._trials + 1, 1 / FORGET)
            expected = self._curve if not less else _probability(_logit(self._curve) + less)
            self._curve = (self._curve + (row - expected) / self._trials).clip(0.0, 1.0)

    def add_verified(
        self,
        slots: np.ndarray,
        budget: int,
        first: np.ndarray,
        accepted: np.ndarray,
        rejected: np.ndarray,
        context: int = 0,
        cut: Flags | None = None,
    ) -> None:
        """What verification said of drafts made by skipping.

        Args:
            slots: [rows] int64.
            budget: the one in use.
            first: [rows] int64 tokens that a draft begins with and that are no evidence.
            accepted: [rows] int64 draft tokens accepted, those included.
            rejected: [rows] bool, whether a token was rejected after these.
            context: what drafts attended to: 0 = all, else the window of this number, from 1.
            cut: [rows] whether the row has more tokens than the window; None: all have.
        """
        if not len(slots):
            return
        seen, won = self._outcomes(first, accepted, rejected)
        expected = self.acceptance(slots, context=context, cut=cut)[:, budget]
        kinds, error = self.kind[slots], (won - expected) * seen
        beside = np.zeros(len(slots))
        if context:
            window, rows = self.windows[context - 1], slice(None) if cut is None else np.flatnonzero(cut)
            own, known = slots[rows], self.drafts.variance[slots[rows]]
            beside[rows] = window.variance[own]
            window.add(own, kinds[rows], expected[rows], won[rows], seen[rows], beside=known)
            window.offset[own] = np.minimum(window.offset[own], 0.0)  # seeing less is never better
            for wider in self.windows[: context - 1]:
                wider.offset[own] = np.maximum(wider.offset[own], window.offset[own])
        self.drafts.add(slots, kinds, expected, won, seen, beside)
        for kind in (0, 1):
            self._add_positions(
                kind, error[kinds == kind], (expected * seen)[kinds == kind], seen[kinds == kind]
            )

    def _add_positions(self, kind: int, error: Array, expected: Array, seen: Flags) -> None:
        information, tokens = (expected * (1 - expected)).sum(0), seen.sum(0)
        variance = self._position_variance[kind] / (1 + self._position_variance[kind] * information)
        step = variance * error.sum(0)
        step[0] = 0.0  # the first is what the others are measured by
        self._position[kind] = (self._position[kind] + step).clip(-LIMIT, LIMIT)
        self._position_variance[kind] = np.minimum(variance + POSITION_DRIFT * tokens, POSITION_SPREAD)
        self._position_tokens[kind] += tokens

    def add_ngrams(self, slots: np.ndarray, accepted: np.ndarray, rejected: np.ndarray) -> None:
        """What became of n-grams of the context; arguments as above."""
        if not len(slots):
            return
        seen, won = self._outcomes(np.zeros_like(accepted), accepted, rejected)
        expected = np.broadcast_to(self.ngram_acceptance(slots)[:, None], seen.shape)
        self.ngrams.add(slots, self.kind[slots], expected, won, seen)

    def _outcomes(self, first: np.ndarray, accepted: np.ndarray, rejected: np.ndarray) -> tuple[Flags, Flags]:
        """[rows, longest] each: which tokens are evidence, and which of them were accepted."""
        won = self._steps < accepted[:, None]
        seen = (self._steps < (accepted + rejected)[:, None]) & (self._steps >= first[:, None])
        return seen, won

    def forget(self, rounds: int = 1) -> None:
        """Decay estimates by rounds, so that methods that are not in use are tried again."""
        kept = (1 - FORGET_ROUND) ** rounds
        for offsets in (self.ngrams, *self.windows):
            offsets.forget(self.kind, 1 - kept)
        self._position_tokens *= kept

    def ngram_acceptance(self, slots: np.ndarray) -> Array:
        """[rows], of a token of an n-gram of the context."""
        return _probability(self.ngrams.offset[slots])

    def add_lengths(self, lengths: np.ndarray, limits: np.ndarray, accepted: np.ndarray) -> None:
        """Where drafts ended: [rows] int64 tokens drafted, allowed and accepted of each."""
        there = self._steps < np.minimum(lengths, limits - 1)[:, None]  # another might have followed
        candidates = np.stack((there, there & (self._steps < accepted[:, None])))
        count, went_on = candidates.sum(1), (candidates & (self._steps < lengths[:, None] - 1)).sum(1)
        self._lengths = np.maximum(np.minimum(self._lengths + count, LENGTHS_MEMORY), count)
        self.continuation_prob += (went_on - count * self.continuation_prob) / self._lengths

    def positions(self) -> Array:
        """[kinds, longest] offset of each position; with few observations near the previous position's."""
        offset = self._position.copy()
        trust = self._position_tokens / (self._position_tokens + ENOUGH_TOKENS)
        before: Array | float = POSITION_GUESS
        for step in self._steps[1:]:
            before = offset[:, step] = before + trust[:, step] * (offset[:, step] - before)
        return offset

    def acceptance(
        self, slots: np.ndarray, optimism: float = 0.0, context: int = 0, cut: Flags | None = None
    ) -> Array:
        """[rows, budgets, longest]: that a token is accepted if those before it were.

        Args:
            optimism: standard deviations of a sequence's estimate that are added to it.
            context, cut: see ``add_verified``.
        """
        curve = np.minimum.accumulate(self._curve)  # skipping more is never better
        unknown = np.maximum(self.drafts.variance[slots] - KNOWN, 0.0)
        offset = self.drafts.offset[slots] + optimism * np.sqrt(unknown) + self._lost(slots, context, cut)
        own = _logit(curve) + offset[:, None]
        own = own[..., None] + self.positions()[self.kind[slots]][:, None]
        return _probability(own)

    def _lost(self, slots: np.ndarray, context: int, cut: Flags | None) -> Array:
        """[rows] logits, at most 0, by not attending to all; arguments as of ``add_verified``."""
        if not context:
            return np.zeros(len(slots))
        windows = [window.offset[slots] for window in self.windows[:context]]
        lost: Array = np.minimum(np.min(windows, axis=0), 0.0)  # a narrower one is never better
        return lost if cut is None else lost * cut


def _window_guess(window: int) -> float:
    """The offset of a window, until there is evidence: a guess, by a first look at summaries."""
    return -0.5 - 0.75 * max(math.log2(2048 / window), 0.0)


def _logit(probability: Array) -> Array:
    clipped = probability.clip(0.02, 0.98)
    logit: Array = np.log(clipped / (1 - clipped))
    return logit


def _probability(logit: Array) -> Array:
    probability: Array = 1 / (1 + np.exp(-logit))
    return probability
