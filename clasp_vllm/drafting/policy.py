"""What drafting asks of a method: to choose the layers that each sequence skips."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from clasp_vllm.control.controller import Controller
from clasp_vllm.control.planner import Choice
from clasp_vllm.drafting.batch import PromptTokens, SequenceBatch


class Policy:
    """Leaves the masks of the ``SequenceTable`` as they are: method ``layer_skip``, and a base for others."""

    controller: Controller | None = None  # to be told what passes show, from the start on

    def reset(self) -> None:
        """Forget all that was learnt."""

    def apply(self) -> None:
        """Put masks that have been chosen since into the table. Called at the start of every round."""

    reads_prompts = False  # whether it wants to be told of prompts

    def read(self, prompts: PromptTokens) -> None:
        """A step has read (parts of) these prompts. Called before the first round of their requests."""

    def take_tasks(self) -> dict[str, int]:
        """Prompts by the task that they were taken for, since the last call; empty where there are none."""
        return {}

    def gauges(self) -> dict[str, float]:
        """Values of gauges for the last choice, by the name of the metric."""
        return {}

    def due(self, slots: np.ndarray, interval: int, limit: int) -> np.ndarray:
        """Rows (indices into ``slots``) whose masks are to be chosen in this round, at most ``limit``.

        ``interval``: rounds between two choices.
        """
        return np.empty(0, dtype=np.int64)

    def passes_due(self, slots: np.ndarray, interval: int) -> tuple[int, bool]:
        """How many rows would be due, and whether the masks of any of them were never chosen."""
        return 0, False

    def optimize(self, batch: SequenceBatch, slots: np.ndarray, choice: Choice) -> Tensor:
        """Choose the masks of a batch, by a pass that runs the target on its last tokens.

        Args:
            slots: [rows] int64 of the batch.
            choice: how the round drafts.

        Returns:
            [rows, hidden_size] the target's final hidden states.
        """
        raise RuntimeError("nothing was due")
