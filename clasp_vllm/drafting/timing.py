"""What forward passes cost: measured once at start-up, corrected while serving."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from clasp_vllm.skipping.controller import PassCosts

RATE = 0.1  # of a correction
BELIEVABLE = 2.0  # a measurement further off than this counts as this


def measure_pass_costs(
    forward: Callable[[int, int], None],
    num_layers: int,
    longest: int,
    synchronize: Callable[[], None],
    repeats: int = 5,
) -> PassCosts:
    """Time ``forward(rows, layers)`` for 1, 2, 4, ... up to ``longest`` rows, all layers and half of them.

    Of the repeats the fastest counts: whatever else the machine does only ever makes them slower.
    """
    few = max(num_layers // 2, 1)
    sizes = [2**i for i in range(longest.bit_length())]
    layer: list[float] = []
    besides: list[float] = []
    for rows in sizes:
        seconds: list[list[float]] = [[], []]
        for _ in range(repeats):
            for layers, found in zip((few, num_layers), seconds, strict=True):
                synchronize()
                before = time.perf_counter()
                forward(rows, layers)
                synchronize()
                found.append(time.perf_counter() - before)
        some, every = (min(found) for found in seconds)
        one = every if num_layers == few else max(every - some, 0.0) / (num_layers - few)
        layer.append(max([one, *layer[-1:]]))  # more rows never cost less
        besides.append(max(every - num_layers * layer[-1], 0.0))
    return PassCosts(tuple(map(float, sizes)), tuple(layer), tuple(besides))


class Mark:
    """A moment in the device's work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._event: Any = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()
        self._time = time.perf_counter()

    def reached(self) -> bool:
        """Whether the device has come to it."""
        return self._event is None or bool(self._event.query())

    def seconds_since(self, earlier: Mark) -> float:
        """Both must have been reached."""
        if self._event is None:
            return self._time - earlier._time
        return float(earlier._event.elapsed_time(self._event)) / 1000


class CostCorrections:
    """Learns how far off the costs measured at start-up are, from the rounds as they are served."""

    def __init__(self) -> None:
        self.scales = {"verify_scale": 1.0, "draft_scale": 1.0, "pass_scale": 1.0}
        self._pending: list[tuple[str, float, Mark, Mark]] = []

    def add(self, kind: str, predicted: float, start: Mark, end: Mark) -> None:
        """``predicted``: seconds without correction of what lies between the marks."""
        self._pending.append((kind, predicted, start, end))

    def settle(self) -> None:
        """Learn from what the device has finished."""
        while self._pending and self._pending[0][3].reached():
            kind, predicted, start, end = self._pending.pop(0)
            scale = self.scales[kind]
            off = end.seconds_since(start) / max(predicted * scale, 1e-9)
            self.scales[kind] = scale * min(max(off, 1 / BELIEVABLE), BELIEVABLE) ** RATE
