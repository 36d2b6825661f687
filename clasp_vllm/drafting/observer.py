"""Seeing what the drafter does, round by round: for measurements and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from clasp_vllm.drafting.batch import SequenceBatch
from clasp_vllm.drafting.draft import DraftOutput, DraftRound, Sample


class RoundObserver(Protocol):
    """Told of every round while it is ``Drafter.observer``.

    A class that inherits from it may leave methods out. What they raise goes on to the engine, and does not
    count as a failure of drafting. To look at a tensor on the device is to wait for it.
    """

    def round_started(self, batch: SequenceBatch, num_tokens: int, sample: Sample) -> DraftOutput | None:
        """A round begins, and nothing has been done for it.

        Args:
            batch: the sequences to draft for.
            num_tokens: of each draft at most.
            sample: the engine's, to choose tokens by.

        Returns:
            Drafts to verify in the place of the drafter's, which is not run then, nor ``round_ended`` called.
            None: the drafter drafts.
        """
        return None

    def round_ended(self, batch: SequenceBatch, drafted: DraftRound | None) -> None:
        """The drafter has drafted for the batch; None: that failed, and there are no drafts."""
        return

    def verified(self, request_ids: Sequence[str], lengths: np.ndarray, rejected: Tensor | None) -> None:
        """The engine has run a step, before the round that follows it. Not told while the drafter idles.

        Args:
            request_ids: [reqs] all that were in the step.
            lengths: [reqs] int, tokens that each ran, drafts included.
            rejected: [reqs] int on the device, how many of its draft tokens were rejected, so that
                ``lengths - 1 - rejected`` of a decoding request were accepted; None if there were none.
        """
        return
