"""Gives all tensor-parallel ranks rank 0's cost corrections and loss budgets, so that they decide alike."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from clasp_vllm.control.costs import Array, CostCorrections
from clasp_vllm.control.gate import Gate
from clasp_vllm.device import HostCopy, to_device

SHARE_EVERY = 16  # rounds, that ranks take what rank 0 says


class RankSync:
    """What this rank decides by. With one rank: what it learns itself.

    Attributes:
        scales: the corrections to decide by.
    """

    def __init__(self, corrections: CostCorrections, ranks: int) -> None:
        self.scales: dict[str, Array] = corrections.scales
        self._corrections = corrections
        self._many = ranks > 1
        if self._many:
            self.scales = {name: scale.copy() for name, scale in self.scales.items()}
        self._pending: HostCopy | None = None
        self._rounds = 0

    def exchange(self, gate: Gate, share: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Now and then take what rank 0 says. All ranks call it each round.

        Args:
            gate: whose balances are exchanged too.
            share: makes a tensor rank 0's on all ranks.
        """
        if not self._many:
            return
        pending, self._pending = self._pending, None
        if pending is not None:
            ends = np.cumsum([len(scale) for scale in self.scales.values()])
            *scales, balances = np.split(pending.get().numpy(), ends)
            self.scales = dict(zip(self.scales, scales, strict=True))
            gate.budget.shared, gate.match_budget.shared = balances.tolist()
        if self._rounds % SHARE_EVERY == 0:
            balances = np.array([gate.budget.balance, gate.match_budget.balance])
            own = *self._corrections.scales.values(), balances
            self._pending = HostCopy(share(to_device(np.concatenate(own).astype(np.float32), device)))
        self._rounds += 1
