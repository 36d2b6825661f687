"""What rounds really take: corrects the costs measured at start-up, and fills the loss budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from clasp_vllm.control.costs import CostCorrections, PassCosts
from clasp_vllm.control.loss_budget import LossBudget
from clasp_vllm.device import DeviceEvent, HostCopy

PAUSE = 2.0  # times what it should take, that a part of a round counts for at most


@dataclass(frozen=True)
class _Verification:
    """A step of the engine that verifies drafts: its rows and tokens, seconds expected without correction,
    how many draft tokens it rejected, its start, and whether all drafts had been looked up."""

    rows: int
    tokens: int
    predicted: float
    rejected: HostCopy
    started: DeviceEvent
    matches: bool


@dataclass(frozen=True)
class _Part:
    """A part of a round to account for: drafting, or a verification; ``expected``: seconds of drafting."""

    rows: int
    verification: _Verification | None
    started: DeviceEvent
    ended: DeviceEvent
    expected: float = 0.0


class RoundTimes:
    """Times rounds. On a GPU times arrive a round late, so that the host never waits."""

    def __init__(self, num_layers: int, corrections: CostCorrections) -> None:
        """
        Args:
            num_layers: of the target.
            corrections: what is learnt goes there.
        """
        self._num_layers = num_layers
        self._corrections = corrections
        self._running: frozenset[str] = frozenset()  # the requests of the last round
        self._ended: DeviceEvent | None = None  # the last round
        self._device: torch.device | None = None
        self._matches = False  # whether its drafts had all been looked up
        self._verification: _Verification | None = None
        self._parts: list[_Part] = []

    def engine_step(
        self, request_ids: Sequence[str], lengths: np.ndarray, rejected: Tensor | None, costs: PassCosts
    ) -> None:
        """The engine has launched a step: see ``Drafter.observe``. ``costs``: without correction."""
        # Steps with prefill are of another kind, and between batches the engine may have waited.
        ended, self._ended, self._verification = self._ended, None, None
        if ended is None or not self._running.issuperset(request_ids):
            return
        rows, tokens = len(lengths), int(lengths.sum())
        # Those not drafted for read their contexts too.
        predicted = float(replace(costs, requests=rows).engine_step(tokens, self._num_layers))
        if tokens == rows:
            self._corrections.add("plain_scale", tokens, predicted, ended, DeviceEvent(ended.device))
        else:
            assert rejected is not None
            rejections = HostCopy(rejected.sum())
            self._verification = _Verification(rows, tokens, predicted, rejections, ended, self._matches)

    def verified(self) -> None:
        """The step's verification ends here, with all that precedes drafting: that is part of its cost."""
        step, self._verification = self._verification, None
        if step is not None:
            ended = DeviceEvent(step.started.device)
            self._corrections.add("verify_scale", step.tokens, step.predicted, step.started, ended)
            self._parts.append(_Part(step.rows, step, step.started, ended))

    def add_drafting(
        self,
        rows: int,
        events: tuple[DeviceEvent, DeviceEvent, DeviceEvent],
        predicted: float,
        pass_seconds: float,
        context: int,
    ) -> None:
        """Drafting by skipping is done.

        Args:
            rows: of the batch.
            events: its start, the end of its optimisation pass, and its end.
            predicted: seconds of the draft steps, without correction.
            pass_seconds: likewise of the pass; 0 = there was none.
            context: that drafts attended to, see ``AcceptanceEvidence``.
        """
        scales = self._corrections.scales
        expected = predicted * scales["draft_scale"][context] + pass_seconds * scales["pass_scale"][0]
        self._parts.append(_Part(rows, None, events[0], events[2], float(expected)))
        if predicted:
            self._corrections.add("draft_scale", context, predicted, *events[1:])
        if pass_seconds:
            self._corrections.add("pass_scale", 0, pass_seconds, *events[:2])

    def round_ended(self, request_ids: Sequence[str], ended: DeviceEvent, matches: bool = False) -> None:
        """A round of these requests has ended. ``matches``: all of its drafts were looked up."""
        self._matches = matches
        self._running, self._ended, self._device = frozenset(request_ids), ended, ended.device

    def idled(self, last: bool) -> None:
        """A plain step without a decision. Of several only the last is timed, when the next step starts."""
        assert self._device is not None
        self._ended = DeviceEvent(self._device) if last else None

    def settle(self, costs: PassCosts, budget: LossBudget, match_budget: LossBudget) -> None:
        """Account for what the device has finished. ``costs``: with corrections."""
        self._corrections.settle()
        while self._parts and self._parts[0].ended.reached():
            part = self._parts.pop(0)
            plain, step = float(costs.plain(part.rows, self._num_layers)), part.verification
            expected = part.expected if step is None else float(costs.verify(step.tokens, self._num_layers))
            # The rest is a pause of the machine, or an estimate so wrong that the next will be better.
            seconds = min(part.ended.seconds_since(part.started), PAUSE * expected)
            if step is None:
                budget.charge_drafting(part.rows, seconds, plain)
            else:
                account = match_budget if step.matches else budget
                account.verified(part.rows, step.tokens - int(step.rejected.get()), seconds, plain)
