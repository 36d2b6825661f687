"""Counts of what drafting did, for people: one log line now and then."""

from __future__ import annotations

import time

import torch
from torch import Tensor


class DraftStatistics:
    """Rounds, optimisation passes and how often each layer was skipped since the last report."""

    def __init__(self, num_layers: int, interval_s: float = 10.0) -> None:
        self.num_layers = num_layers
        self.interval_s = interval_s
        self._reset()

    def _reset(self) -> None:
        self.rounds = 0
        self.sequences = 0
        self.optimized = 0
        self.skips = torch.zeros(self.num_layers)
        self._since = time.monotonic()

    def count_round(self, masks: Tensor, optimized: int) -> None:
        """``masks``: [rows, num_layers, 2] on the host, as used at the end of the round."""
        self.rounds += 1
        self.sequences += len(masks)
        self.optimized += int(optimized)
        self.skips += masks.float().mean(2).sum(0)

    def report(self) -> str | None:
        """A line for the log if the interval has passed and something was drafted, else None."""
        if not self.sequences or time.monotonic() - self._since < self.interval_s:
            return None
        share = self.skips / self.sequences
        top = torch.argsort(share, descending=True, stable=True)[: max(1, int(share.sum().round()))]
        line = (
            f"Drafting rounds: {self.rounds}, optimisation passes: {self.optimized}, "
            f"mean layers skipped: {share.sum():.1f} of {self.num_layers}, layers skipped most: "
            + ", ".join(f"{i} ({share[i]:.0%})" for i in sorted(top.tolist()) if share[i] > 0)
        )
        self._reset()
        return line
