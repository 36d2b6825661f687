"""What became of the last round's drafts: from the engine's counts to evidence of acceptance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clasp_vllm.drafting.acceptance import AcceptanceEvidence
from clasp_vllm.drafting.host import HostCopy
from clasp_vllm.skipping.controller import Choice


@dataclass(frozen=True)
class Drafts:
    """A round's drafts.

    Attributes:
        request_ids: [rows].
        slots: [rows] int64, of the ``SequenceTable``.
        sampling: [rows] bool, whether the request samples.
        looked_up: [rows] bool, whether the draft is an n-gram of the context and not the model's.
        certain: [rows] bool, whether the first token is the full model's own.
        lengths: [rows] int64 on the device, the tokens worth verifying.
        choice: how they were made.
    """

    request_ids: Sequence[str]
    slots: np.ndarray
    sampling: np.ndarray
    looked_up: np.ndarray
    certain: np.ndarray
    lengths: Tensor
    choice: Choice


class Outcomes:
    """Puts drafts and what verification says of them together. On a GPU a round late, never waiting."""

    def __init__(self, evidence: AcceptanceEvidence, longest: int) -> None:
        """``longest``: draft tokens at most."""
        self._evidence = evidence
        self._longest = longest
        self._drafts: Drafts | None = None
        self._pending: tuple[Drafts, np.ndarray, np.ndarray, HostCopy] | None = None

    def drafted(self, drafts: Drafts) -> None:
        """Remember a round's drafts until they are verified."""
        self._drafts = drafts

    def verified(self, request_ids: Sequence[str], verified: np.ndarray, rejected: Tensor | None) -> None:
        """Take in a verification.

        Args:
            request_ids: [reqs] of the engine's step.
            verified: [reqs] int, draft tokens verified, whatever they were.
            rejected: [reqs] int on the device, how many of these were rejected; None if there were none.
        """
        before, self._pending = self._pending, None
        drafts, self._drafts = self._drafts, None
        if drafts is not None and rejected is not None:
            row_of = {request_id: row for row, request_id in enumerate(request_ids)}
            # A request that was preempted comes back with more tokens than a draft has.
            found = [
                (i, row_of[r])
                for i, r in enumerate(drafts.request_ids)
                if r in row_of and verified[row_of[r]] <= self._longest
            ]
            ours, theirs = np.array(found, dtype=np.int64).reshape(-1, 2).T
            index = torch.from_numpy(np.stack((ours, theirs))).to(rejected.device, non_blocking=True)
            counts = torch.stack((drafts.lengths[index[0]], rejected[index[1]].long()))
            self._pending = drafts, ours, verified[theirs], HostCopy(counts)
            if counts.device.type == "cpu":
                before, self._pending = self._pending, None
        if before is not None:
            self._learn(*before)

    def _learn(self, drafts: Drafts, rows: np.ndarray, verified: np.ndarray, counts: HostCopy) -> None:
        lengths, rejected = counts.get().numpy()
        drafted = np.minimum(lengths, verified)  # the scheduler may have cut them
        accepted = np.minimum(verified - rejected, drafted)
        refused = accepted < drafted
        ours = ~drafts.looked_up[rows]
        self._evidence.add_ngrams(drafts.slots[rows][~ours], accepted[~ours], refused[~ours])
        certain = drafts.certain[rows] & (accepted > 0)
        refused &= ~drafts.certain[rows] | (accepted > 0)  # of a certain token neither is evidence
        self._evidence.add_verified(
            drafts.slots[rows][ours],
            drafts.sampling[rows][ours],
            drafts.choice.budget,
            drafts.choice.shared,
            (accepted - certain)[ours],
            refused[ours],
        )
        stopped = ours & (lengths < drafts.choice.length)
        self._evidence.add_lengths(int((lengths[ours] - 1).clip(0).sum()), int(stopped.sum()))
