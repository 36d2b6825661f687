"""How much to skip, how far to draft, and when not to: what promises the most tokens per second.

With ``alpha_k`` the probability that the k-th token of a draft is accepted if those before it were, and
``c_k`` that drafting goes on after it then (it may stop early), a sequence advances in a round of length
``K`` by

    tokens(K) = 1 + sum over k = 1..K of alpha_1 c_1 alpha_2 ... c_(k-1) alpha_k

(Leviathan et al., arXiv 2211.17192, equation 1, for equal alphas and c = 1). Everything that a round does
is a forward pass of some rows through some layers, so one table of what passes cost prices all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from clasp_vllm.control.costs import Array, PassCosts

WORTH_IT = 1.05  # the ratio from which on to speculate: less is not worth the risk of being wrong
HIGHEST_FLOOR = 0.9


@dataclass(frozen=True)
class Choice:
    """What to do in a round.

    Attributes:
        budget: index of the budget chosen.
        length: draft steps at most; 0 = none.
        ngram: tokens to take at most from prompt-lookup matches, for the rows that have one, which
            are not drafted for. 0 = none.
        ratio: tokens per second expected, over plain decoding's.
        seconds: expected of the round.
        tokens: expected of the round, of all rows.
        floor: stop drafting for a sequence whose chance that all its tokens are accepted is less: a
            further token would gain less than it costs.
        context: index of the window of context that drafts attend to.
    """

    budget: int
    length: int
    ngram: int = 0
    ratio: float = 1.0
    seconds: float = 0.0
    tokens: float = 0.0
    floor: float = 0.0
    context: int = 0


@dataclass(frozen=True)
class Ngrams:
    """Prompt-lookup matches of some rows of a batch.

    Attributes:
        acceptance: [rows] of a token of it.
        lengths: [rows] int, how many there are.
    """

    acceptance: Array
    lengths: np.ndarray

    def right(self, longest: int) -> Array:
        """[rows, longest] chance that the first 1, 2, ... tokens are all there and right."""
        step = np.arange(1, longest + 1)
        chances: Array = self.acceptance[:, None] ** step * (step <= self.lengths[:, None])
        return chances

    def take(self, longest: int) -> tuple[Array, Array]:
        """Tokens that the rows advance by, and tokens to verify, taking 0, 1, ... ``longest`` of each."""
        rows = len(self.lengths)
        there = np.arange(1, longest + 1) <= self.lengths[:, None]
        tokens = rows + _from_zero(np.cumsum(self.right(longest).sum(0)))
        return tokens, rows + _from_zero(np.cumsum(there.sum(0)))

    def best(
        self, costs: PassCosts, num_layers: int, others: int, lengths: Sequence[int], padded: bool
    ) -> Choice:
        """The best number of these to verify beside ``others`` rows without drafts.

        ``lengths``: numbers to choose from, ascending, none of them 0.
        """
        longest = lengths[-1]
        tokens, verified = self.take(longest)
        rows = others + len(self.lengths)
        to_verify = rows * np.arange(1, longest + 2) if padded else others + verified
        tokens, seconds = others + tokens[1:], costs.verify(to_verify[1:], num_layers)
        rate = tokens / seconds
        at = max((length - 1 for length in lengths), key=lambda at: float(rate[at]))
        ratio = float(rate[at]) / rows * float(costs.plain(rows, num_layers))
        return Choice(0, 0, at + 1, ratio, float(seconds[at]), float(tokens[at]))


@dataclass(frozen=True)
class Batch:
    """A batch to draft for, in numbers.

    Attributes:
        costs: of forward passes.
        num_layers: of the target.
        acceptance: [rows, budgets, longest] the alphas above.
        layers: [budgets] layers that a draft step of these rows runs.
        continuation_prob: [2, longest] the probability that drafting goes on after the k-th token, of all
            drafts, and of those whose tokens so far will be accepted: the c above.
        lengths: draft lengths to choose from, ascending; none is always one.
        padded: whether drafts that stop early are verified in full length all the same.
        drop_stopped: whether rows that stop early leave the batch of the draft.
    """

    costs: PassCosts
    num_layers: int
    acceptance: Array
    layers: Array
    continuation_prob: Array
    lengths: Sequence[int]
    padded: bool = False
    drop_stopped: bool = True

    @property
    def rows(self) -> int:
        """How many."""
        return int(self.acceptance.shape[0])

    @property
    def longest(self) -> int:
        """The greatest draft length."""
        return int(self.acceptance.shape[2])

    @cached_property
    def chances(self) -> Array:
        """[rows, budgets, longest] that a sequence advances by each token."""
        chances: Array = np.cumprod(self.acceptance, axis=-1) * _before(self.continuation_prob[1])
        return chances

    def advanced(self) -> Array:
        """[rows, budgets, longest + 1] tokens gained with 0, 1, ... draft tokens."""
        return _from_zero(np.cumsum(self.chances, axis=-1))

    @cached_property
    def alive_prob(self) -> Array:
        """[budgets, longest] chance that a row is still drafted for at each step.

        What is gained must have been drafted, so it is never less than the chance of that.
        """
        gained = self.chances.sum(0) / max(self.rows, 1)
        alive_prob: Array = np.maximum(_before(self.continuation_prob[0]), gained)
        alive_prob[..., 0] = 1.0
        return alive_prob

    def drafting(self) -> Array:
        """[budgets, longest + 1] seconds of the draft steps."""
        alive_prob = self.alive_prob
        runs = 1 - (1 - alive_prob) ** self.rows  # the step is run at all
        in_step = np.full(runs.shape, float(self.rows))
        if self.drop_stopped:
            in_step = np.maximum(self.rows * alive_prob / np.maximum(runs, 1e-9), 1.0)
        steps = runs * self.costs.draft_step(in_step, self.layers[..., None])
        return _from_zero(np.cumsum(steps, axis=-1))

    def tokens_to_verify(self) -> Array:
        """[budgets, longest + 1] tokens of a row to verify beside the last sampled one."""
        alive_prob = self.alive_prob
        return _from_zero(np.cumsum(np.ones_like(alive_prob) if self.padded else alive_prob, axis=-1))

    def verify(self, tokens: Any) -> Array:
        """Seconds of the engine's step with drafts."""
        return self.costs.verify(tokens, self.num_layers)

    def floor(self, choice: Choice) -> float:
        """See ``Choice.floor``: what a further token of one row costs, at the rate of the round, over what it
        may gain."""
        if not choice.length:
            return 0.0
        drafted = self.tokens_to_verify()[choice.budget, choice.length]
        rows, tokens = self.rows, self.rows * (1 + drafted)
        layers = self.layers[choice.budget]
        seconds = float(self.costs.draft_step(rows, layers)) / rows
        if not self.padded:
            seconds += max(float(self.verify(tokens + 1) - self.verify(tokens)), 0.0)
        gained = self.acceptance[:, choice.budget, 1:]
        alpha = float(gained.mean()) if gained.size else 1.0
        return min(choice.tokens / choice.seconds * seconds / max(alpha, 0.1), HIGHEST_FLOOR)


def choose(batch: Batch, ngrams: Ngrams | None = None) -> Choice:
    """The best way to speculate for a batch, whether or not it is better than plain decoding.

    Args:
        ngrams: matches of further rows. Some of their tokens are verified as they are.
    """
    rows, ngram_rows = batch.rows, 0 if ngrams is None else len(ngrams.lengths)
    tokens = rows + batch.advanced().sum(0)  # [budgets, longest + 1]
    extra_tokens, extra_verified = (np.zeros(1),) * 2 if ngrams is None else ngrams.take(batch.longest)
    # [budgets, longest + 1, taken + 1]
    tokens = tokens[..., None] + extra_tokens
    verified = rows * (1 + batch.tokens_to_verify()[..., None]) + extra_verified
    allowed = np.zeros(tokens.shape, dtype=bool)
    allowed[:, list(batch.lengths) if rows else []] = True
    if ngrams is None:
        allowed[:, 0] = False  # that is not to speculate
    else:
        allowed[:, 0] = True
        allowed[..., 0] = False
        if batch.padded:
            widest = np.maximum(*np.indices(tokens.shape[1:]))  # [longest + 1, taken + 1]
            verified = (rows + ngram_rows) * (1 + widest)
            allowed &= np.isin(widest, batch.lengths)
    seconds = batch.drafting()[..., None] + batch.verify(verified)
    choice = _best(batch, rows + ngram_rows, tokens, seconds, allowed)
    if batch.padded and ngrams is not None:  # what is verified anyway may be tokens of the context
        choice = replace(choice, ngram=max(choice.length, choice.ngram))
    return choice


def _best(batch: Batch, rows: int, tokens: Array, seconds: Array, allowed: np.ndarray) -> Choice:
    """Of all ways, [budgets, longest + 1, n-gram tokens taken + 1], that of most tokens per second."""
    rate = np.where(allowed, tokens / seconds, 0.0)
    best = np.unravel_index(np.argmax(rate), rate.shape)
    budget, length, ngram = (int(i) for i in best)
    ratio = float(rate[best]) / (rows / float(batch.costs.plain(rows, batch.num_layers)))
    choice = Choice(budget, length, ngram, ratio, float(seconds[best]), float(tokens[best]))
    return replace(choice, floor=batch.floor(choice))


def draft_lengths(longest: int) -> list[int]:
    """Lengths to choose from where the engine captures graphs for each: none, powers of two, the longest."""
    return sorted({0, longest, *(1 << i for i in range(longest.bit_length()))})


def _before(continuation_prob: Array) -> Array:
    """[longest] chance that drafting has not stopped before each token."""
    return np.concatenate((np.ones(1), np.cumprod(continuation_prob[:-1])))


def _from_zero(sums: Any) -> Array:
    """A leading zero on the last axis."""
    return np.concatenate((np.zeros((*sums.shape[:-1], 1)), sums), axis=-1)
