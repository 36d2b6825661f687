"""What speculation gains, from what its parts cost and how often a draft token is accepted.

A round of a batch drafts ``K`` tokens with ``n`` of the layers and verifies them in one step. With
``alpha`` the probability that a draft token is accepted, given that those before it were, a
sequence advances by

    tokens(K) = 1 + alpha + ... + alpha^K        (Leviathan et al., arXiv 2211.17192, equation 1)

in a round, which takes

    round(K, n) = step(K) + drafting + K (draft + n layer + head)

An optimisation pass comes on top, and gives one draft token in the place of a draft step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a round, for one size of the batch.

    Attributes:
        batch: sequences.
        step: of an engine step that verifies this many draft tokens of each sequence, all that has
            to do with drafting apart; step[0] is plain decoding.
        layer: of one layer of a draft step.
        draft: of a draft step with no layers and without the head.
        head: of the head and of choosing a token.
        drafting: of a round of drafting with no draft steps.
        optimize: of an optimisation pass of up to four sequences and its head, for each mask found.
    """

    batch: int
    step: dict[int, float]
    layer: float
    draft: float
    head: float
    drafting: float
    optimize: float | None = None

    def verify(self, num_tokens: float) -> float:
        """Seconds of a step that verifies ``num_tokens`` draft tokens: between those measured, a line."""
        known = sorted(self.step)
        low = max((k for k in known[:-1] if k <= num_tokens), default=known[0])
        high = known[known.index(low) + 1] if len(known) > 1 else low
        if high == low:
            return self.step[low]
        share = (num_tokens - low) / (high - low)
        return self.step[low] + share * (self.step[high] - self.step[low])

    def draft_step(self, num_layers: float) -> float:
        """Seconds of a draft step that runs ``num_layers`` layers."""
        return self.draft + num_layers * self.layer + self.head

    def round(
        self,
        verified: float,
        draft_steps: float,
        num_layers: float,
        optimizations: float = 0.0,
    ) -> float:
        """Seconds of a round.

        Args:
            verified: draft tokens verified.
            draft_steps: forward passes of the draft.
            num_layers: layers that each runs.
            optimizations: masks found.
        """
        seconds = self.verify(verified) + self.drafting + draft_steps * self.draft_step(num_layers)
        if optimizations:
            assert self.optimize is not None
            seconds += optimizations * self.optimize
        return seconds

    def ratio(
        self,
        tokens: float,
        verified: float,
        draft_steps: float,
        num_layers: float,
        optimizations: float = 0.0,
    ) -> float:
        """Tokens per second over plain decoding's, where a sequence advances by ``tokens`` a round."""
        return tokens * self.step[0] / self.round(verified, draft_steps, num_layers, optimizations)


def expected_tokens(alpha: float, num_tokens: int) -> float:
    """Tokens that a sequence advances by when ``num_tokens`` drafts are each accepted with ``alpha``."""
    return sum(alpha**i for i in range(num_tokens + 1))


def best_ratio(costs: Costs, alpha: float, num_layers: float, longest: int) -> tuple[float, int]:
    """The largest ratio over the draft lengths 1 to ``longest`` with fixed masks, and that length."""
    return max((costs.ratio(expected_tokens(alpha, k), k, k, num_layers), k) for k in range(1, longest + 1))


def break_even(costs: Costs, num_layers: float, longest: int) -> float | None:
    """The acceptance from which on drafting with ``num_layers`` layers pays; None: it never does."""
    if best_ratio(costs, 1.0, num_layers, longest)[0] < 1.0:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if best_ratio(costs, middle, num_layers, longest)[0] < 1.0:
            low = middle
        else:
            high = middle
    return high


def costs_by_batch(results: dict[str, Any]) -> dict[int, Costs]:
    """The costs in what `clasp-vllm costs --json` wrote, by size of the batch."""
    by_batch = {}
    for costs in results["costs"]:
        step = {int(length): seconds for length, seconds in costs["step"].items()}
        by_batch[costs["batch"]] = Costs(**(costs | {"step": step}))
    return by_batch
