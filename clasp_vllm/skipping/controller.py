"""How much to skip, how far to draft, and when not to: what promises the most tokens per second.

With ``alpha`` the probability that a draft token is accepted if those before it were, and ``c`` that
drafting goes on after a token (it may stop early), a sequence advances in a round of length ``K`` by

    tokens(K) = 1 + sum over k = 1..K of alpha^k c^(k-1)

(Leviathan et al., arXiv 2211.17192, equation 1, for c = 1). Everything that a round does is a forward pass
of some rows through some layers, so one table of what passes cost prices all of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from clasp_vllm.skipping.dynamic_program import columns_at

Array = np.ndarray[Any, np.dtype[np.float64]]

WORTH_IT = 1.02  # the ratio from which on to speculate: less is not worth the risk of being wrong
PASS_SHARE = 0.02  # of the time, what optimisation passes may cost beyond the draft steps they replace
PROBE_SHARE = 0.005  # of the time, what probes may lose while speculation is off
INTERVALS = (8, 1024)  # rounds between two passes for a sequence


@dataclass(frozen=True)
class PassCosts:
    """Seconds of a forward pass, by how many rows it has.

    Attributes:
        rows: [sizes] ascending, those measured.
        layer: [sizes] of one layer.
        besides: [sizes] of all else: embedding, head, metadata, choosing a token.
        verify_scale, draft_scale, pass_scale: corrections, learnt while serving, of engine steps, draft
            steps and optimisation passes.
    """

    rows: tuple[float, ...]
    layer: tuple[float, ...]
    besides: tuple[float, ...]
    verify_scale: float = 1.0
    draft_scale: float = 1.0
    pass_scale: float = 1.0

    def scaled(self, scales: Mapping[str, float]) -> PassCosts:
        """With other corrections, by name."""
        return PassCosts(self.rows, self.layer, self.besides, **scales)

    def _at(self, values: tuple[float, ...], rows: Any) -> Array:
        """Between the sizes measured a line, beyond the last the line through the last two."""
        found: Array = np.interp(rows, self.rows, values)
        if len(self.rows) > 1:
            slope = max(0.0, (values[-1] - values[-2]) / (self.rows[-1] - self.rows[-2]))
            found = found + slope * np.maximum(np.asarray(rows) - self.rows[-1], 0.0)
        return found

    def forward(self, rows: Any, layers: Any) -> Array:
        """Seconds of a pass of ``rows`` rows through ``layers`` layers; both may be arrays."""
        return self._at(self.besides, rows) + np.asarray(layers) * self._at(self.layer, rows)

    def verify(self, tokens: Any, num_layers: int) -> Array:
        """Seconds of an engine step that decodes and verifies ``tokens`` tokens in all."""
        return self.verify_scale * self.forward(tokens, num_layers)

    def draft(self, rows: Any, layers: Any) -> Array:
        """Seconds of a draft step."""
        return self.draft_scale * self.forward(rows, layers)

    def optimize(self, rows: int, num_layers: int, budget: int) -> float:
        """Seconds of an optimisation pass of ``rows`` sequences."""
        columns = [rows * columns_at(layer, budget) for layer in range(num_layers)]
        besides = float(self._at(self.besides, columns[-1]))
        return self.pass_scale * (besides + float(self._at(self.layer, columns).sum()))


@dataclass(frozen=True)
class Choice:
    """What to do in a round.

    Attributes:
        budget: index of the budget chosen.
        length: tokens to draft by skipping layers at most; 0 = none.
        shared: whether all rows skip the same layers.
        ngram: tokens to take at most from what the context offers, for the rows that it offers any; these
            are not drafted for otherwise. 0 = none.
        ratio: tokens per second expected, over plain decoding's.
        seconds: expected of the round.
        tokens: expected of the round, of all rows.
    """

    budget: int
    length: int
    shared: bool
    ngram: int = 0
    ratio: float = 1.0
    seconds: float = 0.0
    tokens: float = 0.0


@dataclass(frozen=True)
class Ngrams:
    """What the context offers for some rows of a batch.

    Attributes:
        acceptance: [rows] of a token of it.
        lengths: [rows] int, how many there are.
    """

    acceptance: Array
    lengths: np.ndarray

    def take(self, longest: int) -> tuple[Array, Array]:
        """Tokens that the rows advance by, and tokens to verify, taking 0, 1, ... ``longest`` of each."""
        step = np.arange(1, longest + 1)
        there = step <= self.lengths[:, None]
        gained = (self.acceptance[:, None] ** step * there).sum(0)
        rows = len(self.lengths)
        tokens = rows + np.concatenate(([0.0], np.cumsum(gained)))
        verified = rows + np.concatenate(([0.0], np.cumsum(there.sum(0))))
        return tokens, verified


def choose(
    costs: PassCosts,
    num_layers: int,
    acceptance: Array,
    layers: Array,
    going_on: float,
    longest: int,
    padded: bool = False,
    narrows: bool = True,
    ngrams: Ngrams | None = None,
) -> Choice:
    """The best way to speculate for a batch, whether or not it is better than plain decoding.

    Args:
        num_layers: of the target.
        acceptance: [2, rows, budgets] of a draft token, with each row's own mask and with a shared one;
            or [1, rows, budgets] where none may be shared.
        layers: [2, budgets] layers that a draft step of these rows runs, in the same order; or [1, budgets].
        going_on: the probability that drafting goes on after a token.
        longest: draft tokens at most, from 1 on.
        padded: whether drafts that stop early are verified in full length all the same, and lengths are
            those of ``draft_lengths`` only.
        narrows: whether rows that stop early leave the batch of the draft.
        ngrams: of further rows, for which the context offers something. Some of that is taken.
    """
    rows = acceptance.shape[1]
    step = np.arange(longest)
    stays = going_on**step  # a row is still drafted for at the step
    runs = 1 - (1 - stays) ** rows  # the step is run at all
    in_step = np.maximum(1.0, rows * stays / np.maximum(runs, 1e-9)) if narrows else np.full(longest, rows)
    drafted = step + 1.0 if padded else np.cumsum(stays)  # [longest], of a row
    # [2, budgets, longest + 1], from no draft tokens on
    tokens = rows + _from_zero(np.cumsum((acceptance[..., None] ** (step + 1) * stays).sum(1), axis=-1))
    drafting = _from_zero(np.cumsum(runs * costs.draft(in_step, layers[..., None]), axis=-1))
    verified = rows * (1 + _from_zero(drafted))
    extra_tokens, extra_verified = (np.zeros(1),) * 2 if ngrams is None else ngrams.take(longest)
    # [2, budgets, longest + 1, taken + 1]
    tokens = tokens[..., None] + extra_tokens
    steps = costs.verify(verified[:, None] + extra_verified, num_layers)
    seconds = drafting[..., None] + steps
    rate = tokens / seconds
    plain = float(rate[0, 0, 0, 0])
    rate[..., 0, 0] = 0.0  # that is not to speculate
    if ngrams is not None:
        rate[..., 0] = 0.0
    if not rows:
        rate[:, :, 1:] = 0.0
    if padded:
        rate[:, :, np.isin(np.arange(longest + 1), draft_lengths(longest), invert=True)] = 0.0
    best = np.unravel_index(np.argmax(rate), rate.shape)
    shared, budget, length, ngram = (int(i) for i in best)
    ratio = float(rate[best]) / plain
    return Choice(budget, length, bool(shared), ngram, ratio, float(seconds[best]), float(tokens[best]))


def draft_lengths(longest: int) -> list[int]:
    """Lengths to choose from where the engine captures graphs for each: none, powers of two, the longest."""
    return sorted({0, longest, *(1 << i for i in range(longest.bit_length()))})


def _from_zero(sums: Any) -> Array:
    """A leading zero on the last axis."""
    return np.concatenate((np.zeros((*sums.shape[:-1], 1)), sums), axis=-1)


def rounds_between_passes(
    costs: PassCosts, num_layers: int, budget: int, choice: Choice, rows: int, layers: float
) -> int:
    """How often a sequence's layers may be chosen anew for passes to take ``PASS_SHARE`` of the time."""
    extra = costs.optimize(1, num_layers, budget) - float(costs.draft(1, layers))
    share = rows * max(extra, 0.0) / (PASS_SHARE * choice.seconds)
    return int(min(max(math.ceil(share), INTERVALS[0]), INTERVALS[1]))


class Probes:
    """When to speculate although it does not seem to pay, so as to notice when it does."""

    def __init__(self) -> None:
        self._saved = 0.0  # seconds that may be lost

    def due(self, choice: Choice, plain_seconds: float) -> bool:
        """Count a step of ``plain_seconds``; whether to speculate as ``choice`` says all the same.

        Should none of its drafts be accepted, all probes together lose ``PROBE_SHARE`` of the time.
        """
        self._saved += PROBE_SHARE * plain_seconds
        loss = choice.seconds - plain_seconds
        if self._saved < loss:
            return False
        self._saved -= loss
        return True
