"""What drafting remembers of each sequence between rounds: its skip mask and the mask's age."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

NEVER = np.iinfo(np.int64).max
GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, fill the unit interval evenly


class SequenceTable:
    """Skip masks and their ages, by request id.

    Holds ``capacity`` sequences, enough for all that can run at once. When it is full a new
    sequence takes the slot of the one seen longest ago, which has finished or waits; one that comes
    back starts afresh. A sequence has ``initial_mask`` until its own is chosen.
    """

    def __init__(self, capacity: int, initial_mask: Tensor) -> None:
        """``initial_mask``: [budgets, num_layers, 2] bool, True = skipped; one mask for each budget."""
        self.capacity = capacity
        self._first_mask = initial_mask
        self.version = 0  # grows whenever a mask changes
        self.reset()

    def reset(self) -> None:
        """Forget all sequences."""
        capacity, initial_mask = self.capacity, self._first_mask
        self.initial_mask = initial_mask
        self.masks = initial_mask.repeat(capacity, 1, 1, 1)  # [capacity, budgets, num_layers, 2]
        self.changed = 0  # masks set that were not as before
        self.has_own = np.zeros(capacity, dtype=bool)  # whether its own mask has been chosen
        self.age = np.full(capacity, NEVER, dtype=np.int64)  # rounds since then
        # Where an initial mask is good enough to start with: the rounds over which new sequences spread
        # until theirs is chosen. Else it is chosen at once.
        self.spread: int | None = None
        self._arrivals = 0
        self.version += 1
        self._started: list[int] = []
        self._slots: OrderedDict[str, int] = OrderedDict()  # least recently seen first

    def __len__(self) -> int:
        return len(self._slots)

    def slots(self, request_ids: Sequence[str]) -> np.ndarray:
        """[n] int64, the slot of each sequence; new ones get one."""
        for request_id in request_ids:  # so that new ones take the slots of others
            if request_id in self._slots:
                self._slots.move_to_end(request_id)
        return np.array([self._slot(request_id) for request_id in request_ids], dtype=np.int64)

    def _slot(self, request_id: str) -> int:
        slot = self._slots.get(request_id)
        if slot is None:
            if len(self._slots) < self.capacity:
                slot = len(self._slots)
            else:
                _, slot = self._slots.popitem(last=False)
            self._slots[request_id] = slot
            self.has_own[slot] = False
            self.age[slot] = NEVER if self.spread is None else self._next_age(self.spread)
            self.masks[slot] = self.initial_mask
            self.version += 1
            self._started.append(slot)
        self._slots.move_to_end(request_id)
        return slot

    def _next_age(self, spread: int) -> int:
        """0 to ``spread``, evenly over the arrivals and the same on every rank; ``spread`` is due at once."""
        self._arrivals += 1
        return round(self._arrivals * GOLDEN % 1.0 * spread)

    def take_started(self) -> list[int]:
        """The slots that new sequences got since the last call."""
        started, self._started = self._started, []
        return started

    def set_masks(self, request_ids: Sequence[str], masks: Tensor) -> None:
        """Store [n, budgets, num_layers, 2] masks. Those of sequences forgotten since are passed over."""
        known = [i for i, request_id in enumerate(request_ids) if request_id in self._slots]
        slots = [self._slots[request_ids[i]] for i in known]
        self.changed += int((self.masks[slots] != masks[known]).flatten(1).any(1).sum())
        self.masks[slots] = masks[known]
        self.version += 1

    def set_initial_mask(self, mask: Tensor) -> None:
        """Change the [budgets, num_layers, 2] masks of sequences whose own has not been chosen."""
        self.initial_mask = mask
        self.masks[torch.from_numpy(~self.has_own)] = mask
        self.version += 1

    def due(self, slots: np.ndarray, interval: int, limit: int) -> np.ndarray:
        """Rows (indices into ``slots``) whose masks are to be chosen now, at most ``limit``.

        Those whose masks are ``interval`` rounds old or have never been chosen, the oldest first.
        """
        age = self.age[slots]
        rows = np.flatnonzero(age >= interval)
        return rows[np.argsort(-age[rows], kind="stable")][:limit]

    def advance(self, slots: np.ndarray, renewed: np.ndarray) -> None:
        """Count one round; ``renewed`` rows have just had their masks chosen."""
        age = self.age[slots]
        self.age[slots] = np.where(age == NEVER, NEVER, age + 1)
        self.age[slots[renewed]] = 1
        self.has_own[slots[renewed]] = True
