"""What forward passes cost: measured once at start-up, corrected while serving."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clasp_vllm.device import DeviceEvent, synchronize
from clasp_vllm.skipping.dynamic_program import columns_at

Array = np.ndarray[Any, np.dtype[np.float64]]

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # rows, to know costs of
RATE = 0.1  # of a correction, once there have been some
# A measurement further off than this counts as this: a pause of the machine makes a step look slow, nothing
# makes it look fast.
BELIEVABLE = 0.5, 1.25
_SIZES = np.array(SIZES, dtype=np.float64)
STEPS = "plain_scale", "verify_scale"  # corrections of the engine's steps, by size
QUERIES = 4  # tokens of a request, to know what verifying several costs over a long context


@dataclass(frozen=True)
class PassCosts:
    """Seconds of a forward pass, by how many rows it has.

    Attributes:
        rows: [sizes] ascending, those measured.
        layer: [sizes] of one layer.
        fixed: [sizes] of all else: embedding, head, metadata, choosing a token.
        step_rows, step: [sizes] tokens, ascending, and seconds of the engine's own step of so many, where
            that is not a pass like a draft's; empty: it is.
        draft_layer, draft_fixed: [sizes] of a draft's pass, where it runs other weights; empty: the same.
        pass_layer, pass_fixed: [sizes] of a pass that is called module by module, as optimisation passes are,
            where drafts are not; empty: they are too.
        context_rows, context: [sizes] rows, ascending, and seconds that a layer takes for each token of
            context of each of so many rows; empty: not known, and taken to be nothing.
        context_query: [sizes] what each further token of a request adds to this, as a share of the first's.
        requests, tokens, draft_tokens: of the batch that is asked about: its rows, and the mean tokens of
            context that its rows have and that drafts attend to.
        draft_context: which of the contexts to choose from drafts attend to.
        plain_scale, verify_scale: corrections, learnt while serving, of engine steps without and with
            drafts to verify: one, or one for each of ``SIZES``.
        draft_scale: of draft steps: one, or one for each context.
        pass_scale: of optimisation passes.
    """

    rows: tuple[float, ...]
    layer: tuple[float, ...]
    fixed: tuple[float, ...]
    step_rows: tuple[float, ...] = ()
    step: tuple[float, ...] = ()
    draft_layer: tuple[float, ...] = ()
    draft_fixed: tuple[float, ...] = ()
    pass_layer: tuple[float, ...] = ()
    pass_fixed: tuple[float, ...] = ()
    context_rows: tuple[float, ...] = ()
    context: tuple[float, ...] = ()
    context_query: tuple[float, ...] = ()
    requests: int = 0
    tokens: float = 0.0
    draft_tokens: float = 0.0
    draft_context: int = 0
    plain_scale: Any = 1.0
    verify_scale: Any = 1.0
    draft_scale: Any = 1.0
    pass_scale: Any = 1.0

    def scaled(self, scales: Mapping[str, Any]) -> PassCosts:
        """With other corrections, by name."""
        return replace(self, **scales)

    def over(self, lengths: np.ndarray, window: int | None = None, context: int = 0) -> PassCosts:
        """Of a batch whose rows have these tokens of context, [rows] int, of which drafts see a window.

        Args:
            window: tokens that a draft attends to at most; None: all.
            context: the number of this among the contexts to choose from.
        """
        if not self.context or not len(lengths):
            return replace(self, draft_context=context) if context else self
        tokens = float(lengths.mean())
        draft_tokens = tokens if window is None else float(np.minimum(lengths, window).mean())
        return replace(
            self, requests=len(lengths), tokens=tokens, draft_tokens=draft_tokens, draft_context=context
        )

    def _reading(self, rows: Any, tokens: float) -> Array:
        """Seconds that a layer takes to read the context of ``rows`` rows of so many tokens each."""
        if not tokens:
            return np.zeros(())
        seconds: Array = np.asarray(rows) * tokens * np.interp(rows, self.context_rows, self.context)
        return seconds

    def _at(self, values: tuple[float, ...], rows: Any) -> Array:
        return _interpolate(rows, self.rows, values)

    def forward(self, rows: Any, layers: Any) -> Array:
        """Seconds of a pass of ``rows`` rows through ``layers`` layers; both may be arrays."""
        return self._at(self.fixed, rows) + np.asarray(layers) * self._at(self.layer, rows)

    def plain(self, rows: Any, num_layers: int) -> Array:
        """Seconds of an engine step that decodes ``rows`` sequences and verifies nothing."""
        return _between(self.plain_scale, rows) * self.engine_step(rows, num_layers)

    def verify(self, tokens: Any, num_layers: int) -> Array:
        """Seconds of an engine step that decodes and verifies ``tokens`` tokens in all."""
        return _between(self.verify_scale, tokens) * self.engine_step(tokens, num_layers)

    def engine_step(self, tokens: Any, num_layers: int) -> Array:
        """Seconds of a step of the engine of ``tokens`` tokens, without correction."""
        rows = np.minimum(tokens, self.requests)
        seconds: Array = num_layers * self._reading(rows, self.tokens)
        if self.tokens:
            further = np.asarray(tokens) / np.maximum(rows, 1) - 1
            seconds = seconds * (1 + further * np.interp(rows, self.context_rows, self.context_query))
        if self.step:
            return seconds + _interpolate(tokens, self.step_rows, self.step)
        return seconds + self.forward(tokens, num_layers)

    def draft_step(self, rows: Any, layers: Any) -> Array:
        """Seconds of a draft step."""
        fixed = self._at(self.draft_fixed or self.fixed, rows)
        layer = self._at(self.draft_layer or self.layer, rows) + self._reading(rows, self.draft_tokens)
        scales = np.atleast_1d(self.draft_scale)
        seconds: Array = fixed + np.asarray(layers) * layer
        return seconds * float(scales[min(self.draft_context, len(scales) - 1)])

    def optimize(self, rows: int, num_layers: int, budget: int) -> float:
        """Seconds of an optimisation pass of ``rows`` sequences."""
        columns = rows * np.array([columns_at(layer, budget) for layer in range(num_layers)])
        fixed = float(self._at(self.pass_fixed or self.draft_fixed or self.fixed, columns[-1]))
        layers = float(self._at(self.pass_layer or self.draft_layer or self.layer, columns).sum())
        layers += float(self._reading(columns, self.draft_tokens).sum())
        target = 0.0  # it runs besides where no column is the target itself
        if self.draft_layer or self.draft_tokens < self.tokens:
            target = float(self.forward(rows, num_layers) + num_layers * self._reading(rows, self.tokens))
        return float(_between(self.pass_scale, 1)) * (target + fixed + layers)


def _interpolate(rows: Any, sizes: tuple[float, ...], values: tuple[float, ...]) -> Array:
    """Between the sizes measured a line, beyond the last through it and half its rows."""
    seconds: Array = np.interp(rows, sizes, values)
    if len(sizes) > 1 and np.max(rows) > sizes[-1]:
        half = sizes[-1] / 2
        slope = max(0.0, (values[-1] - float(np.interp(half, sizes, values))) / half)
        seconds = seconds + slope * np.maximum(np.asarray(rows) - sizes[-1], 0.0)
    return seconds


def _between(scale: Any, rows: Any) -> Array:
    """A correction, for so many rows."""
    scales = np.asarray(scale, dtype=np.float64)
    correction: Array = np.interp(rows, SIZES, scales) if scales.size > 1 else scales.reshape(())
    return correction


@dataclass(frozen=True)
class LayerShares:
    """The shares of attention and MLP in what a layer costs; they add up to 1."""

    attention: float
    mlp: float

    @classmethod
    def of(cls, attention: float, mlp: float) -> LayerShares:
        """From what each costs, in any unit."""
        return cls(attention / (attention + mlp), mlp / (attention + mlp))

    def layers_run(self, masks: Tensor) -> Tensor:
        """[..., num_layers, 2] bool masks to [...] float64, what is left to run, in layers."""
        shares = torch.tensor((self.attention, self.mlp), dtype=torch.float64)
        left: Tensor = (masks.logical_not().sum(-2) * shares).sum(-1)
        return left

    def cost(self, parts: Sequence[int]) -> float:
        """What single sub-layers cost, in layers. ``parts``: 0 for each attention, 1 for each MLP."""
        mlps = sum(parts)
        return mlps * self.mlp + (len(parts) - mlps) * self.attention


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
    fixed: list[float] = []
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
        fixed.append(max(with_all - num_layers * layer[-1], 0.0))
    return PassCosts(tuple(map(float, sizes)), tuple(layer), tuple(fixed))


@dataclass(frozen=True)
class ContextPass:
    """A pass over a context that can be timed.

    Attributes:
        forward: takes rows, tokens of context and tokens of each row, at the end of it; waits for the end.
        short, long: tokens of context to compare.
        rows: the most that are worth comparing.
    """

    forward: Callable[[int, int, int], None]
    short: int
    long: int
    rows: int


def measure_context_costs(
    costs: PassCosts, of: ContextPass | None, num_layers: int, repeats: int = 3, several: bool = True
) -> PassCosts:
    """``costs`` with what attending to more tokens adds; the fastest of some repeats counts.

    ``several``: measure passes of several queries for a row too. Else further queries add nothing.
    """
    if of is None:
        return costs

    def more(rows: int, queries: int) -> float:
        """Seconds of a layer, for each token of context of each row."""
        seconds = {of.short: math.inf, of.long: math.inf}
        for _ in range(repeats):
            for tokens in seconds:
                before = time.perf_counter()
                of.forward(rows, tokens, queries)
                seconds[tokens] = min(seconds[tokens], time.perf_counter() - before)
        longer = max(seconds[of.long] - seconds[of.short], 0.0)
        return longer / (num_layers * rows * (of.long - of.short))

    sizes = sorted({1, of.rows})
    context = [more(rows, 1) for rows in sizes]
    further = [0.0] * len(sizes)
    if several:
        further = [
            min(max((more(rows, QUERIES) / max(one, 1e-12) - 1) / (QUERIES - 1), 0.0), 1.0)
            for rows, one in zip(sizes, context, strict=True)
        ]
    return replace(
        costs,
        context_rows=tuple(map(float, sizes)),
        context=tuple(context),
        context_query=tuple(further),
    )


def measure_steps(
    steps: Mapping[int, Callable[[], object]], device: torch.device, repeats: int = 4
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


class CostCorrections:
    """Learns how far off the costs measured at start-up are, from the rounds as they are served.

    Plain steps and those that verify drafts each have a correction for every one of ``SIZES``: the engine
    may run them by other kernels and graphs than drafts, and each size by others. Draft steps have one for
    each context that they may attend to. Sizes and contexts of which nothing has been seen yet lie on lines
    between those that have, and a kind of engine step never seen is like the other.

    Attributes:
        scales: by the names of the corrections of ``PassCosts``; [sizes], [contexts] or [1] float64.
    """

    def __init__(self, contexts: int = 1) -> None:
        """``contexts``: how many there are to choose from."""
        self.scales: dict[str, Array] = {name: np.ones(len(SIZES)) for name in STEPS}
        self.scales |= {"draft_scale": np.ones(contexts), "pass_scale": np.ones(1)}
        self._seen = {name: np.zeros(len(scale)) for name, scale in self.scales.items()}
        self._pending: list[tuple[str, float, float, DeviceEvent, DeviceEvent]] = []

    def add(self, kind: str, of: float, predicted: float, start: DeviceEvent, end: DeviceEvent) -> None:
        """Between the events was something that has a correction.

        Args:
            of: rows of an engine step; the context of draft steps; else 0.
            predicted: seconds without correction.
        """
        self._pending.append((kind, of, predicted, start, end))

    def settle(self) -> None:
        """Learn from what the device has finished."""
        while self._pending and self._pending[0][-1].reached():
            kind, of, predicted, start, end = self._pending.pop(0)
            self._learn(kind, of, end.seconds_since(start) / max(predicted, 1e-9))

    def _learn(self, kind: str, of: float, ratio: float) -> None:
        scale, seen = self.scales[kind], self._seen[kind]
        at, near = _neighbours(of) if kind in STEPS else (np.array([int(of)]), np.ones(1))
        off = min(max(ratio / float(near @ scale[at]), BELIEVABLE[0]), BELIEVABLE[1])
        scale[at] *= off ** (near * np.maximum(RATE, 1 / (2 + seen[at])))
        seen[at] += near
        known, places = seen >= 0.5, _SIZES if kind in STEPS else np.arange(len(scale))
        scale[~known] = np.interp(places[~known], places[known], scale[known])
        if kind in STEPS:
            for other in STEPS:
                if not self._seen[other].any():
                    self.scales[other][:] = scale


def _neighbours(rows: float) -> tuple[Array, Array]:
    """The indices of the two sizes that a number of rows lies between, and how near it is to each."""
    low = min(max(int(np.searchsorted(_SIZES, rows, side="right")) - 1, 0), len(SIZES) - 2)
    share = (min(max(rows, SIZES[0]), SIZES[-1]) - SIZES[low]) / (SIZES[low + 1] - SIZES[low])
    return np.array([low, low + 1]), np.array([1 - share, share])
