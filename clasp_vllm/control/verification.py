"""What became of the last round's drafts: from the engine's counts to evidence of acceptance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clasp_vllm.control.acceptance import AcceptanceEvidence
from clasp_vllm.control.early_exit import Confidence
from clasp_vllm.control.planner import Choice
from clasp_vllm.device import HostCopy, to_device


@dataclass(frozen=True)
class UnverifiedDrafts:
    """A round's drafts.

    Attributes:
        request_ids: [rows].
        slots: [rows] int64, of the ``SequenceTable``.
        looked_up: [rows] bool, whether the draft is an n-gram of the context and not the model's.
        certain: [rows] bool, whether the first token is the target's own.
        lengths: [rows] int64 on the device, the tokens worth verifying.
        drafted: [rows] int64, the tokens drafted where rows go on together though some have stopped; None:
            as many as are worth verifying.
        limits: [rows] int64, the tokens there might have been, had drafting not stopped early.
        confidence: [rows, tokens] float32 on the device, how sure the draft was of each; None: not known.
        choice: how they were made.
        cut: [rows] bool, whether they attended to a part of the context; None: not known.
    """

    request_ids: Sequence[str]
    slots: np.ndarray
    looked_up: np.ndarray
    certain: np.ndarray
    lengths: Tensor
    drafted: np.ndarray | None
    limits: np.ndarray
    confidence: Tensor | None
    choice: Choice
    cut: np.ndarray | None = None


@dataclass(frozen=True)
class _Verified:
    """Verified drafts, whose counts are still being copied to the host.

    Attributes:
        rows: [n] int64, those of ``drafts`` that were verified.
        verified: [n] int, draft tokens verified of each.
        counts: [2, n] int64 lengths of the drafts and tokens rejected.
        confidence: [n, tokens], how sure the draft was.
    """

    drafts: UnverifiedDrafts
    rows: np.ndarray
    verified: np.ndarray
    counts: HostCopy
    confidence: HostCopy | None


class VerificationOutcomes:
    """Puts drafts and what verification says of them together. On a GPU a round late, never waiting."""

    def __init__(self, evidence: AcceptanceEvidence, confidence: Confidence, longest: int) -> None:
        """``longest``: draft tokens at most."""
        self._evidence = evidence
        self._confidence = confidence
        self._longest = longest
        self._drafts: UnverifiedDrafts | None = None
        self._pending: _Verified | None = None

    def remember(self, drafts: UnverifiedDrafts) -> None:
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
            pairs = [
                (i, row_of[r])
                for i, r in enumerate(drafts.request_ids)
                if r in row_of and verified[row_of[r]] <= self._longest
            ]
            ours, theirs = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
            on_device = to_device(np.stack((ours, theirs)), rejected.device)
            counts = torch.stack((drafts.lengths[on_device[0]], rejected[on_device[1]].long()))
            sure = None if drafts.confidence is None else HostCopy(drafts.confidence[on_device[0]])
            self._pending = _Verified(drafts, ours, verified[theirs], HostCopy(counts), sure)
            if counts.device.type == "cpu":
                before, self._pending = self._pending, None
        if before is not None:
            self._learn(before)

    def _learn(self, verification: _Verified) -> None:
        drafts, rows, verified = verification.drafts, verification.rows, verification.verified
        lengths, rejected = verification.counts.get().numpy()
        ngram = drafts.looked_up[rows]
        ours = ~ngram & (drafts.limits[rows] > 0)
        slots, limits, first = drafts.slots[rows], drafts.limits[rows], drafts.certain[rows].astype(np.int64)
        there = lengths if drafts.drafted is None else np.where(ours, drafts.drafted[rows], lengths)
        drafted = np.minimum(there, verified)  # the scheduler may have cut them
        accepted = np.minimum(verified - rejected, drafted)
        any_rejected = accepted < drafted
        self._evidence.add_ngrams(slots[ngram], accepted[ngram], any_rejected[ngram])
        if not ours.any():
            return
        self._evidence.add_verified(
            slots[ours],
            drafts.choice.budget,
            first[ours],
            accepted[ours],
            any_rejected[ours],
            drafts.choice.context,
            None if drafts.cut is None else drafts.cut[rows][ours],
        )
        self._evidence.add_lengths(lengths[ours], limits[ours], accepted[ours])
        if verification.confidence is not None:
            sure = verification.confidence.get().numpy()
            step = np.arange(sure.shape[1])
            seen = (step >= first[:, None]) & (step < (accepted + any_rejected)[:, None]) & ours[:, None]
            self._confidence.add(self._evidence.kind[slots], sure, step < accepted[:, None], seen)
