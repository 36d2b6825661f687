"""What forward passes cost: measured once at start-up, corrected while serving."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from clasp_vllm.skipping.controller import SIZES, Array, PassCosts

RATE = 0.1  # of a correction, once there have been some
BELIEVABLE = 2.0  # a measurement further off than this counts as this
_SIZES = np.array(SIZES, dtype=np.float64)
STEPS = "plain_scale", "verify_scale"  # corrections of the engine's steps, by size


def measure_pass_costs(
    forward: Callable[[int, int], None],
    num_layers: int,
    longest: int,
    synchronize: Callable[[], None],
    repeats: int = 4,
) -> PassCosts:
    """Time ``forward(rows, layers)`` for all ``SIZES`` up to ``longest`` rows, all layers and half of them.

    Of the repeats the fastest counts: whatever else the machine does only ever makes them slower. More rows
    may cost less: kernels are made for some sizes.
    """
    few = max(num_layers // 2, 1)
    sizes = [size for size in SIZES if size <= longest]
    layer: list[float] = []
    besides: list[float] = []
    for rows in sizes:
        seconds: list[list[float]] = [[], []]
        for _ in range(repeats):
            for layers, times in zip((few, num_layers), seconds, strict=True):
                synchronize()
                before = time.perf_counter()
                forward(rows, layers)
                synchronize()
                times.append(time.perf_counter() - before)
        with_few, with_all = (min(times) for times in seconds)
        per_layer = with_all if num_layers == few else max(with_all - with_few, 0.0) / (num_layers - few)
        layer.append(per_layer)
        besides.append(max(with_all - num_layers * layer[-1], 0.0))
    return PassCosts(tuple(map(float, sizes)), tuple(layer), tuple(besides))


def measure_steps(
    steps: Mapping[int, Callable[[], None]], device: torch.device, repeats: int = 4
) -> list[float]:
    """Seconds of each step, the fastest of some repeats."""
    seconds = []
    for step in steps.values():
        times = []
        for _ in range(repeats):
            synchronize(device)
            before = time.perf_counter()
            step()
            synchronize(device)
            times.append(time.perf_counter() - before)
        seconds.append(min(times))
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait for the device, where there is something to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize()


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
    """Learns how far off the costs measured at start-up are, from the rounds as they are served.

    Plain steps and those that verify drafts each have a correction for every one of ``SIZES``: the engine
    may run them by other kernels and graphs than drafts, and each size by others. Sizes of which nothing has
    been seen yet lie on lines between those that have, and a kind of step never seen is like the other.

    Attributes:
        scales: by the names of the corrections of ``PassCosts``; [sizes] float64, or [1].
    """

    def __init__(self) -> None:
        self.scales: dict[str, Array] = {name: np.ones(len(SIZES)) for name in STEPS}
        self.scales |= {"draft_scale": np.ones(1), "pass_scale": np.ones(1)}
        self._seen = {name: np.zeros(len(scale)) for name, scale in self.scales.items()}
        self._pending: list[tuple[str, float, float, Mark, Mark]] = []

    def add(self, kind: str, rows: float, predicted: float, start: Mark, end: Mark) -> None:
        """``predicted``: seconds without correction of ``rows`` rows between the marks."""
        self._pending.append((kind, rows, predicted, start, end))

    def settle(self) -> None:
        """Learn from what the device has finished."""
        while self._pending and self._pending[0][-1].reached():
            kind, rows, predicted, start, end = self._pending.pop(0)
            self._learn(kind, rows, end.seconds_since(start) / max(predicted, 1e-9))

    def _learn(self, kind: str, rows: float, ratio: float) -> None:
        scale, seen = self.scales[kind], self._seen[kind]
        at, near = _neighbours(rows) if kind in STEPS else (np.zeros(1, dtype=np.int64), np.ones(1))
        off = min(max(ratio / float(near @ scale[at]), 1 / BELIEVABLE), BELIEVABLE)
        scale[at] *= off ** (near * np.maximum(RATE, 1 / (4 + seen[at])))
        seen[at] += near
        if kind in STEPS:
            known = seen >= 0.5
            scale[~known] = np.interp(_SIZES[~known], _SIZES[known], scale[known])
            for other in STEPS:
                if not self._seen[other].any():
                    self.scales[other][:] = scale


def _neighbours(rows: float) -> tuple[Array, Array]:
    """The indices of the two sizes that a number of rows lies between, and how near it is to each."""
    low = min(max(int(np.searchsorted(_SIZES, rows, side="right")) - 1, 0), len(SIZES) - 2)
    share = (min(max(rows, SIZES[0]), SIZES[-1]) - SIZES[low]) / (SIZES[low + 1] - SIZES[low])
    return np.array([low, low + 1]), np.array([1 - share, share])
