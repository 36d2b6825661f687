"""KNN-SSD's match: the nearest of some anchors says which task a prompt is of (arXiv 2505.16162, section 3).

An anchor is a mean of embeddings of a task's prompts; the embedding of a prompt is the mean over its tokens
of the final hidden states, as in the paper's code. Nearest is by cosine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Anchors:
    """Anchors of several tasks.

    Attributes:
        vectors: [anchors, hidden_size] float32.
        tasks: [anchors] int64, the task that each is of.
        least: [anchors] float32, the cosine to an anchor below which a prompt is not of its task.
    """

    vectors: Tensor
    tasks: Tensor
    least: Tensor

    def to(self, device: torch.device) -> Anchors:
        """The same on a device."""
        return Anchors(self.vectors.to(device), self.tasks.to(device), self.least.to(device))

    def match(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """The tasks of prompts.

        Args:
            embeddings: [rows, hidden_size].

        Returns:
            tasks: [rows] int64 of the nearest of the anchors that are near enough, -1 where none is.
            cosine: [rows] float32 to that anchor, or to the nearest of all.
        """
        unit = torch.nn.functional.normalize
        cosines = unit(embeddings.float(), dim=1) @ unit(self.vectors, dim=1).T
        near = cosines >= self.least
        cosine, nearest = cosines.masked_fill(~near & near.any(1, keepdim=True), -torch.inf).max(dim=1)
        return torch.where(near.any(1), self.tasks[nearest], -1), cosine
