"""When to stop drafting for a sequence: after an unsure token, or when too little can come of it."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from clasp_vllm.device import to_device

EDGES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)  # between bins of confidence
FIRST_TRIALS = 4.0  # tokens that the guess counts for
MEMORY = 300.0  # tokens that a bin remembers


class Exit(Protocol):
    """A rule to stop by, for one round."""

    def stops(self, confidence: Tensor, rows: slice | Tensor) -> Tensor:
        """[n] bool, whether to stop after a further token of these rows.

        ``confidence``: [n] float32, the probability of the draft's most likely token.
        """
        ...


class FixedExit:
    """Stops after a token less probable than a threshold (CLaSp's and Self-SD's rule)."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def stops(self, confidence: Tensor, rows: slice | Tensor) -> Tensor:
        """See ``Exit``."""
        return confidence < self._threshold


class SurvivalExit:
    """Stops when the chance that all tokens drafted are accepted is below a floor."""

    def __init__(self, accepted: Tensor, edges: Tensor, rows: int, floor: float) -> None:
        """``accepted``: [rows, bins] float32, how often tokens of each bin of confidence are."""
        self._accepted, self._edges = accepted, edges
        self._survival = torch.ones(rows, device=accepted.device)
        self._floor = floor

    def stops(self, confidence: Tensor, rows: slice | Tensor) -> Tensor:
        """See ``Exit``."""
        bins = torch.bucketize(confidence, self._edges, right=True)
        survival = self._survival[rows] * self._accepted[rows].gather(1, bins.unsqueeze(1)).squeeze(1)
        self._survival[rows] = survival
        return survival < self._floor


class Confidence:
    """How often draft tokens are accepted, by how sure the draft was: learnt from verification."""

    def __init__(self) -> None:
        edges = np.array((0.0, *EDGES, 1.0))
        sure = (edges[1:] + edges[:-1]) / 2
        # A guess, until there is evidence. By kind: greedy, accepted as often as the draft is sure; sampling,
        # where a token drawn by an unsure draft is also accepted if the target is as unsure.
        self.accepted = np.stack((sure, (1 + sure) / 2))
        self._trials = np.full(self.accepted.shape, FIRST_TRIALS)
        self._edges: Tensor | None = None  # kept on the device: a copy would wait for it

    def add(self, kinds: np.ndarray, confidence: np.ndarray, won: np.ndarray, seen: np.ndarray) -> None:
        """Outcomes of tokens whose predecessors were accepted: [rows, tokens] each, but [rows] kinds."""
        bins = np.digitize(confidence, EDGES)
        where = np.broadcast_to(kinds[:, None], bins.shape)[seen], bins[seen]
        count, total = np.zeros_like(self.accepted), np.zeros_like(self.accepted)
        np.add.at(count, where, 1.0)
        np.add.at(total, where, won[seen].astype(np.float64))
        self._trials = np.maximum(np.minimum(self._trials + count, MEMORY), count)
        self.accepted += (total - count * self.accepted) / self._trials

    def exit(self, kinds: np.ndarray, floor: float, device: torch.device) -> SurvivalExit:
        """The rule of a round of [rows] ``kinds``."""
        if self._edges is None:
            self._edges = torch.tensor(EDGES, device=device)
        accepted = to_device(self.accepted[kinds].astype(np.float32), device)
        return SurvivalExit(accepted, self._edges, len(kinds), floor)
