"""Who chooses the layers that each sequence skips: what drafting asks of a method."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from clasp_vllm.control.controller import Controller
from clasp_vllm.drafting.batch import DraftBatch, PromptTokens


class Policy:
    """Leaves the masks of the ``SequenceTable`` as they are: method ``layer_skip``, and a base for others."""

    controller: Controller | None = None  # to be told what passes show, from the start on

    def reset(self) -> None:
        """Forget all that was learnt."""

    def apply(self) -> None:
        """Put masks that have been found since into the table. Called at the start of every round."""

    reads_prompts = False  # whether it wants to be told of prompts

    def read(self, prompts: PromptTokens) -> None:
        """A step has read (parts of) these prompts. Called before the first round of their requests."""

    def take_tasks(self) -> dict[str, int]:
        """Prompts by the task that they were taken for, since the last call; empty where there are none."""
        return {}

    def gauges(self) -> dict[str, float]:
        """What there is to see of the last choice, by the name of its metric."""
        return {}

    def due(self, slots: np.ndarray, interval: int) -> np.ndarray:
        """Rows (indices into ``slots``) whose masks are to be chosen anew in this round.

        ``interval``: rounds between two choices.
        """
        return np.empty(0, dtype=np.int64)

    def optimize(self, batch: DraftBatch, slots: np.ndarray) -> Tensor:
        """Choose the masks of a batch anew, by a pass that runs the full model on its last tokens.

        Args:
            slots: [rows] int64 of the batch.

        Returns:
            [rows, hidden_size] the full model's final hidden states.
        """
        raise RuntimeError("nothing was due")
