"""The best way to speculate for a batch: what is known of its requests, put into numbers for the planner."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from clasp_vllm.control.acceptance import AcceptanceEvidence
from clasp_vllm.control.costs import Array, LayerShares, PassCosts
from clasp_vllm.control.planner import WORTH_IT, Batch, Choice, Ngrams, choose, draft_lengths

MAX_BATCHES = 256  # sets of sequences, of which what draft steps run is kept
WORTH_CUTTING = 0.75  # of the context, that a window may hold at most to be considered
SKIPPING_EVERY = 8  # rounds with prompt-lookup matches, after which drafts by skipping are priced again


@dataclass(frozen=True)
class Sequences:
    """The sequences of a round.

    Attributes:
        slots: [rows] int64, of the ``SequenceTable``.
        masks: [capacity, budgets, num_layers, 2] bool, each sequence's own.
        match_lengths: [rows] int64, of prompt-lookup matches; 0 = there is none.
        lengths: [rows] int, tokens of context.
        version: another one whenever a mask has changed; None: not known.
    """

    slots: np.ndarray
    masks: Tensor
    match_lengths: np.ndarray
    lengths: np.ndarray
    version: int | None


class Pricing:
    """Prices ways to speculate, and keeps what takes long to work out."""

    def __init__(
        self,
        contexts: Sequence[int | None],
        num_layers: int,
        shares: LayerShares,
        longest: int,
        open_choices: Collection[str],
        padded: bool,
        drop_stopped: bool,
    ) -> None:
        """See ``Controller``."""
        self._contexts = contexts
        self._num_layers = num_layers
        self._shares = shares
        self._longest = longest
        self._padded = padded
        self._drop_stopped = drop_stopped
        self._lengths: Sequence[int] = [longest]
        if "length" in open_choices:
            self._lengths = [k for k in (draft_lengths(longest) if padded else range(longest + 1)) if k]
        self._layers: dict[bytes, Array] = {}
        self._version: int | None = None
        self.reset()

    def reset(self) -> None:
        """Forget what was priced: slots may be those of others."""
        self._layers.clear()
        # By optimism: the slots, their best choice with layer skipping, and its age in rounds.
        self._skipping: dict[float, tuple[bytes, Choice, int]] = {}

    def best(
        self, costs: PassCosts, evidence: AcceptanceEvidence, of: Sequences, optimism: float = 0.0
    ) -> Choice:
        """The best way to speculate, with prompt-lookup matches where they are better than drafting.

        Args:
            costs: of forward passes, with corrections.
            optimism: see ``AcceptanceEvidence.acceptance``.
        """
        if of.version is None or of.version != self._version or len(self._layers) >= MAX_BATCHES:
            self._layers.clear()
            self._version = of.version
        slots, looked_up = of.slots, np.flatnonzero(of.match_lengths)
        every = np.arange(len(slots))
        if not looked_up.size:
            return self._choose(costs, evidence, of, every, optimism)
        # How good drafts by skipping are changes slowly, and to work it out costs more than a lookup.
        known, skipping, age = self._skipping.get(optimism, (b"", None, 0))
        if skipping is None or known != slots.tobytes() or age == SKIPPING_EVERY:
            skipping, age = self._choose(costs, evidence, of, every, optimism), 0
        self._skipping[optimism] = slots.tobytes(), skipping, age + 1
        ngrams = _ngrams(evidence, of)
        if looked_up.size == len(slots) and not self._padded:
            taken = ngrams.best(costs, self._num_layers, 0, self._longest, padded=False)
        else:
            others = np.flatnonzero(of.match_lengths == 0)
            taken = self._choose(costs, evidence, of, others, optimism, ngrams)
        return max(skipping, taken, key=lambda choice: choice.ratio)

    def ngrams_pay(self, costs: PassCosts, evidence: AcceptanceEvidence, of: Sequences) -> bool:
        """Whether prompt-lookup matches may pay by themselves."""
        ngrams = _ngrams(evidence, of)
        if not ngrams.lengths.size:
            return False
        others = len(of.slots) - ngrams.lengths.size
        best = ngrams.best(costs, self._num_layers, others, self._longest, self._padded)
        return best.ratio >= WORTH_IT

    def _choose(
        self,
        costs: PassCosts,
        evidence: AcceptanceEvidence,
        of: Sequences,
        rows: np.ndarray,
        optimism: float,
        ngrams: Ngrams | None = None,
    ) -> Choice:
        """The best of all contexts that drafts may attend to."""
        slots, lengths, mean = of.slots[rows], of.lengths[rows], float(of.lengths.mean())
        layers = self._layers_run(of, slots)
        choices = []
        for context, window in enumerate(self._contexts):
            cut = None
            if window is not None:
                if context and np.minimum(of.lengths, window).mean() > WORTH_CUTTING * mean:
                    continue
                cut = lengths > window
            batch = Batch(
                costs.over(of.lengths, window, context),
                self._num_layers,
                evidence.acceptance(slots, optimism, context, cut),
                layers,
                evidence.continuation_prob,
                self._lengths,
                self._padded,
                self._drop_stopped,
            )
            choices.append(replace(choose(batch, ngrams), context=context))
        return max(choices, key=lambda choice: choice.ratio)

    def _layers_run(self, of: Sequences, slots: np.ndarray) -> Array:
        """[budgets] layers that a draft step of these runs, worked out once until a mask changes."""
        layers = self._layers.get(slots.tobytes())
        if layers is None:
            own = of.masks[torch.from_numpy(slots)].all(0)
            layers = self._shares.layers_run(own).numpy()
            self._layers[slots.tobytes()] = layers
        return layers


def _ngrams(evidence: AcceptanceEvidence, of: Sequences) -> Ngrams:
    looked_up = np.flatnonzero(of.match_lengths)
    return Ngrams(evidence.ngram_acceptance(of.slots[looked_up]), of.match_lengths[looked_up])
