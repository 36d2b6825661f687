"""When to speculate although it does not seem to pay, so as to notice when it does."""

from __future__ import annotations

from clasp_vllm.control.planner import Choice

PROBE_SHARE = 0.002  # of the time, what probes may lose while speculation is off


class Probes:
    """When to speculate although it does not seem to pay, so as to notice when it does."""

    def __init__(self) -> None:
        self._saved = 0.0  # seconds that may be lost

    def due(self, choice: Choice, plain_seconds: float, steps: int = 1) -> bool:
        """Count steps of ``plain_seconds`` each; whether to speculate as ``choice`` says all the same.

        Should none of its drafts be accepted, all probes together lose ``PROBE_SHARE`` of the time.
        """
        self._saved += PROBE_SHARE * plain_seconds * steps
        loss = choice.seconds - plain_seconds
        if self._saved < loss:
            return False
        self._saved -= loss
        return True
