"""The best way to speculate for a batch: what is known of its requests, put into numbers for the planner."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from clasp_vllm.control.acceptance import AcceptanceEvidence
from clasp_vllm.control.costs import Array, LayerShares, PassCosts
from clasp_vllm.control.planner import Batch, Choice, Ngrams, choose, draft_lengths

MAX_BATCHES = 256  # sets of sequences, of which what draft steps run is kept
WORTH_CUTTING = 0.75  # of the context, that a window may hold at most to be considered


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

    def best(
        self, costs: PassCosts, evidence: AcceptanceEvidence, of: Sequences, optimism: float = 0.0
    ) -> Choice:
        """The best way to draft by skipping, whatever was looked up.

        Args:
            costs: of forward passes, with corrections.
            optimism: see ``AcceptanceEvidence.acceptance``.
        """
        return self._choose(costs, evidence, of, np.arange(len(of.slots)), optimism)

    def matches(self, costs: PassCosts, evidence: AcceptanceEvidence, of: Sequences) -> Choice:
        """The best number of tokens to take from prompt-lookup matches, of which there are some."""
        ngrams = _ngrams(evidence, of)
        others = len(of.slots) - ngrams.lengths.size
        lengths = self._lengths if self._padded else range(1, self._longest + 1)
        return ngrams.best(costs, self._num_layers, others, lengths, self._padded)

    def beside(self, costs: PassCosts, evidence: AcceptanceEvidence, of: Sequences) -> Choice:
        """The best way to take such matches beside drafts by skipping for the other sequences."""
        others = np.flatnonzero(of.match_lengths == 0)
        if not others.size and not self._padded:
            return self.matches(costs, evidence, of)
        return self._choose(costs, evidence, of, others, 0.0, _ngrams(evidence, of))

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
        if of.version is None or of.version != self._version or len(self._layers) >= MAX_BATCHES:
            self._layers.clear()
            self._version = of.version
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
