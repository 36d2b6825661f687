"""What optimisation passes have found so far, as a prior for the next: by sequence, and over all of them.

A pass looks at one token, and the layers that are best to skip for it are only roughly those for the
tokens after it. Averages over tokens judge better; and a new sequence need not start from nothing. The mean
of the target's hidden states is kept too, as the programme's ``centre``.
"""

from __future__ import annotations

import torch
from torch import Tensor

CENTRE_PRIOR = 4  # passes that the first guess of the mean hidden states, zero, counts for
CENTRE_RATE = 1 / 256  # of a pass in the mean hidden states, at least


class SkipEvidence:
    """Decaying averages of margins and hidden states. All on the device; nothing waits for it."""

    def __init__(
        self, capacity: int, num_layers: int, columns: int, memory: float, device: torch.device
    ) -> None:
        """
        Args:
            capacity: sequences, by the slots of the ``SequenceTable``.
            memory: what a sequence's own average keeps at each pass. The average over all takes a
                quarter of the share of a new pass.
        """
        self.memory = memory
        self.passes = 0
        self._own = torch.zeros(capacity, num_layers, columns, device=device)
        self._known = torch.zeros(capacity, dtype=torch.bool, device=device)  # since the last reset
        self._overall = torch.zeros(num_layers, columns, device=device)
        # [num_layers, hidden_size] mean of the target's states after each layer.
        self.centre: Tensor | None = None

    def reset(self) -> None:
        """Forget everything."""
        self.passes = 0
        self._own.zero_()
        self._known.zero_()
        self._overall.zero_()
        self.centre = None

    def prior(self, slots: Tensor, fresh: Tensor) -> Tensor | None:
        """[num_layers, columns, rows] margins for [rows] slots; None if there are none yet.

        ``fresh``: [rows] bool, sequences without a pass of their own: theirs is the average over all.
        """
        if self.passes == 0:
            return None
        own = self._own[slots]
        fresh = fresh | ~self._known[slots]
        return torch.where(fresh.view(-1, 1, 1), self._overall, own).permute(1, 2, 0)

    def update(self, slots: Tensor, margins: Tensor, prior: Tensor | None, means: Tensor) -> None:
        """Take in a pass.

        Args:
            slots: [rows] int64.
            margins: [num_layers, columns, rows], blended with ``prior``.
            means: [num_layers, hidden_size], see ``Programme``.
        """
        self._own[slots] = margins.permute(2, 0, 1)
        self._known[slots] = True
        self.passes += 1
        alone = margins if prior is None else (margins - self.memory * prior) / (1 - self.memory)
        self._overall.lerp_(alone.mean(2), max(1 / self.passes, (1 - self.memory) / 4))
        if self.centre is None:
            self.centre = torch.zeros_like(means)
        rate = max(1 / (self.passes + CENTRE_PRIOR), CENTRE_RATE)
        self.centre.lerp_(torch.where(means.isfinite(), means, self.centre), rate)

    def overall_choices(self) -> Tensor:
        """[num_layers, columns, 1] bool, the choices of the average over all sequences."""
        return (self._overall > 0).unsqueeze(-1)
