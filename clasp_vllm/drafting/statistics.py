"""Counts of what drafting did, and a line for the log now and then."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clasp_vllm.device import DeviceEvent

# What is chosen and used now, and what it means on /metrics.
GAUGES = {
    "cuda_graphs": "CUDA graphs that draft steps are run by; 0 = module by module.",
    "draft_length": "Draft tokens by layer skipping chosen for a round; 0 = none are drafted so now.",
    "skipped_layers": "Layers that the best draft would skip.",
    "draft_context": "Tokens of context that the best draft would attend to at most; 0 = all.",
    "expected_ratio": "Tokens per second that the best draft promises, over plain decoding's.",
    "similarity": "Cosine of the last hidden state of the draft to the target's, at the number of layers "
    "skipped now, as the last optimisation pass found it (on a GPU the one before).",
}
# The counts that are metrics, and what they mean there.
COUNTERS = {
    "rounds": "Drafting rounds of the batch.",
    "steps": "Forward passes of the draft.",
    "sublayers": "Attention and MLP sub-layers that forward passes of the draft ran.",
    "plain_steps": "Engine steps after which nothing was drafted: it would not have paid, or the cost of "
    "a plain step was to be measured.",
    "ngrams": "Drafts looked up in the context, one per sequence and round.",
    "early_exit_tokens": "Draft tokens left undrafted because drafting for a sequence stopped early.",
    "passes": "Optimisation passes of the batch.",
    "pass_seconds": "Time that optimisation passes took.",
    "optimized": "Skip masks chosen, one per sequence and optimisation pass.",
    "changed": "Of these, those that differ from the sequence's before, for any number of layers.",
    "failures": "Drafting rounds that failed and went without drafts.",
}
PLAIN_AT_ONCE = 16  # steps without drafts, that are told of together


@dataclass
class DraftCounts:
    """Totals since the start.

    Attributes:
        rounds: drafting rounds of the batch.
        sequences: drafts, one per sequence and round.
        steps: forward passes of the draft.
        sublayers: attention and MLP sub-layers that these ran.
        plain_steps: engine steps after which nothing was drafted: it would not have paid, or the cost of a
            plain step was to be measured.
        ngrams: drafts looked up in the context, one per sequence and round, or expected to be there.
        early_exit_tokens: draft tokens left undrafted because drafting for a sequence stopped early.
        passes: optimisation passes of the batch.
        pass_seconds: that these took; on a GPU those that have ended.
        optimized: masks chosen, one per sequence and optimisation pass.
        changed: of these, those that differ from the sequence's before, at any budget.
        failures: rounds that failed and went without drafts.
        skips: [num_layers] float64, drafts that skipped the layer (a half for half a layer).
    """

    rounds: int
    sequences: int
    steps: int
    sublayers: int
    plain_steps: int
    ngrams: int
    early_exit_tokens: int
    passes: int
    pass_seconds: float
    optimized: int
    changed: int
    failures: int
    skips: Tensor


class DraftStatistics:
    """Counts rounds and reports on them every ``interval_s`` seconds at most."""

    def __init__(self, num_layers: int, interval_s: float = 10.0) -> None:
        self.interval_s = interval_s
        skips = torch.zeros(num_layers, dtype=torch.float64)  # in float32 a sum stays at 2^24
        self.total = DraftCounts(**dict.fromkeys(COUNTERS, 0), sequences=0, skips=skips)
        self._reported = self._copy()
        self._taken: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self._reported_at = time.monotonic()
        self._passes: list[tuple[DeviceEvent, DeviceEvent]] = []
        self._kept: Counter[float] = Counter()
        self._skips_taken = skips.clone()

    def _copy(self) -> DraftCounts:
        return replace(self.total, skips=self.total.skips.clone())

    def count_round(self, masks: Tensor, steps: int, optimized: int) -> None:
        """``masks``: [rows, num_layers, 2] bool on the host, as they are at the end of the round."""
        self.total.rounds += 1
        self.total.sequences += len(masks)
        self.total.steps += steps
        self.total.optimized += optimized
        skips = masks.float().mean(2)
        self.total.skips += skips.sum(0)
        self._kept.update((masks.shape[1] - skips.sum(1)).tolist())

    def count_pass(self, started: DeviceEvent, ended: DeviceEvent) -> None:
        """An optimisation pass between two moments of the device."""
        self.total.passes += 1
        self._passes.append((started, ended))

    def take_kept(self) -> dict[float, int]:
        """Drafts by the number of layers that they ran, since the last call."""
        kept, self._kept = self._kept, Counter()
        return dict(kept)

    def take_skips(self) -> list[float]:
        """[num_layers] drafts that skipped each layer (a half for half of it), since the last call.

        Empty where nothing was drafted; to be called before ``take_kept``.
        """
        if len(self._kept) == 0:
            return []
        taken, self._skips_taken = self._skips_taken, self.total.skips.clone()
        skips: list[float] = (self._skips_taken - taken).tolist()
        return skips

    def take(self) -> dict[str, float]:
        """What has been counted since the last call, by name; what has not is left out.

        Steps without drafts are told of ``PLAIN_AT_ONCE`` at a time, for they should cost nothing.
        """
        while self._passes and self._passes[0][1].reached():
            started, ended = self._passes.pop(0)
            self.total.pass_seconds += ended.seconds_since(started)
        now = {name: getattr(self.total, name) for name in COUNTERS}
        new = {name: count - self._taken[name] for name, count in now.items() if count > self._taken[name]}
        if new.keys() == {"plain_steps"} and new["plain_steps"] < PLAIN_AT_ONCE:
            return {}
        self._taken = now
        return new

    def report(self) -> str | None:
        """A line for the log, or None if it is too early or nothing was drafted."""
        now, last = self.total, self._reported
        sequences = now.sequences - last.sequences
        if not sequences or time.monotonic() - self._reported_at < self.interval_s:
            return None
        share = (now.skips - last.skips) / sequences
        most = torch.argsort(share, descending=True, stable=True)[: round(float(share.sum()))]
        layers = ", ".join(f"{layer} ({share[layer]:.0%})" for layer in sorted(most.tolist()))
        line = (
            f"Layer skipping: drafting rounds: {now.rounds - last.rounds}, "
            f"draft steps: {now.steps - last.steps}, steps without drafts: "
            f"{now.plain_steps - last.plain_steps}, drafts looked up: {now.ngrams - last.ngrams}, "
            f"masks chosen: {now.optimized - last.optimized}, "
            f"mean layers skipped: {share.sum():.1f} of {len(share)}, skipped most: {layers or 'none'}"
        )
        self._reported, self._reported_at = self._copy(), time.monotonic()
        return line
