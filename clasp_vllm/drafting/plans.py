"""Which sub-layers a draft step of a batch runs, worked out once for each set of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clasp_vllm.control.planner import Choice
from clasp_vllm.device import from_host
from clasp_vllm.drafting.sequences import SequenceTable

MAX_PLANS = 256  # kept; there is one for every set of sequences drafted for


@dataclass(frozen=True)
class Plan:
    """The sub-layers of a draft step.

    Attributes:
        steps: layer, part, and whether some rows skip it.
        masks: [rows, num_layers, 2] bool on the device, True = skipped; None where all rows run alike.
        window: tokens of context that it attends to, see ``drafting.context``; None: all.
    """

    steps: list[tuple[int, int, bool]]
    masks: Tensor | None = None
    window: int | None = None

    @classmethod
    def of(cls, masks: Tensor, device: torch.device, window: int | None = None) -> Plan:
        """The sub-layers that any row runs, by [rows, num_layers, 2] bool on the host, True = skipped."""
        any_skips, all_skip = masks.any(0).tolist(), masks.all(0).tolist()
        steps = [
            (layer, part, any_skips[layer][part])
            for layer in range(masks.shape[1])
            for part in range(2)
            if not all_skip[layer][part]
        ]
        mixed = any(step[2] for step in steps)
        return cls(steps, from_host(masks, device) if mixed else None, window)


class Plans:
    """Plans by sequences and choice, until a mask changes."""

    def __init__(
        self, sequences: SequenceTable, contexts: Sequence[int | None], device: torch.device
    ) -> None:
        """``contexts``: windows, see ``DrafterOptions``."""
        self._sequences = sequences
        self._contexts = contexts
        self._device = device
        self._plans: dict[tuple[bytes, int, int], Plan] = {}
        self._version = -1

    def masks(self, slots: np.ndarray, choice: Choice) -> Tensor:
        """[rows, num_layers, 2] bool on the host, what each row skips."""
        return self._sequences.masks[torch.from_numpy(slots), choice.budget]

    def plan(self, slots: np.ndarray, choice: Choice) -> Plan:
        """The sub-layers that any row runs."""
        if self._version != self._sequences.version or len(self._plans) >= MAX_PLANS:
            self._plans.clear()
            self._version = self._sequences.version
        key = slots.tobytes(), choice.budget, choice.context
        plan = self._plans.get(key)
        if plan is None:
            plan = Plan.of(self.masks(slots, choice), self._device, self._contexts[choice.context])
            self._plans[key] = plan
        return plan
