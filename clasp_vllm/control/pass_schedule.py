"""When optimisation passes choose sequences' layers again, and for how many sequences at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from clasp_vllm.control.costs import PassCosts
from clasp_vllm.control.planner import Choice

PASS_SHARE = 0.02  # of the time, what passes may cost beyond the draft steps they replace
INTERVALS = (8, 1024)  # rounds between two passes for a sequence


class PassSchedule:
    """Spaces passes out while drafting pays, and holds them back where the loss budget would not bear them.

    Attributes:
        interval: rounds between two passes for a sequence.
        most: sequences that may be in the pass of this round.
    """

    def __init__(self, interval: int | None, num_layers: int, budget: int, capacity: int) -> None:
        """
        Args:
            interval: rounds between two passes for a sequence, where that is fixed.
            num_layers: of the target.
            budget: the most layers that a pass chooses to skip.
            capacity: sequences there may be.
        """
        self.interval = INTERVALS[0] if interval is None else interval
        self.most = capacity
        self._fixed = interval is not None
        self._num_layers, self._budget = num_layers, budget

    def space_out(self, costs: PassCosts, choice: Choice, rows: int, layers: float) -> int:
        """The interval, for passes to take ``PASS_SHARE`` of the time. ``layers``: that a draft step runs."""
        if not self._fixed:
            extra = costs.optimize(1, self._num_layers, self._budget) - float(costs.draft_step(1, layers))
            share = rows * max(extra, 0.0) / (PASS_SHARE * choice.seconds)
            self.interval = int(min(max(math.ceil(share), INTERVALS[0]), INTERVALS[1]))
        return self.interval

    def with_passes(
        self,
        choice: Choice,
        due: int,
        needed: bool,
        costs: PassCosts,
        affords: Callable[[Choice], bool],
    ) -> Choice:
        """The choice with the seconds of as many passes that are due as the loss budget bears.

        A round that chooses layers takes several plain steps where drafts are dear, and may gain nothing.

        Args:
            due: sequences whose layers are due to be chosen.
            needed: whether there must be a pass, for there are sequences whose layers never were.
        """
        for self.most in range(due, 0, -1):
            seconds = costs.optimize(self.most, self._num_layers, self._budget)
            with_passes = replace(choice, seconds=choice.seconds + seconds)
            if affords(with_passes) or (needed and self.most == 1):
                return with_passes
        self.most = 0
        return choice
