"""PREDICTION, not measurement: what speculation gains on GPUs, from bytes, operations and acceptance.

    .venv/bin/python scripts/bench/predict.py > docs/predictions.md

A part of a pass takes the longer of reading its bytes and computing its products, at a share of what the
data sheet promises; tensor parallelism adds two all-reduces a layer. Draft layers, run one by one, take
``overhead`` more: public measurements of vLLM on an H100 (a draft that skips nothing, 0.89 to 0.94 of plain)
say 6 to 11 %. In optimisation passes, and drafts of more requests than there are CUDA graphs for, the host
calls every layer, which takes ``host`` at least.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from clasp_vllm.config.schema import MAX_OPTIMIZED_REQUESTS
from clasp_vllm.control.pass_schedule import INTERVALS, PASS_SHARE
from clasp_vllm.control.planner import WORTH_IT
from clasp_vllm.skipping.dynamic_program import columns_at
from clasp_vllm.tools.cost_model import Costs, expected_tokens

LONGEST = 8  # draft tokens
REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (1_000, 32_000)
TENSOR_PARALLEL = (1, 4, 8)
LARGEST_GRAPH = 128  # requests


@dataclass(frozen=True)
class Gpu:
    """Of NVIDIA's data sheets: bytes per second, bfloat16 operations per second (dense), bytes of memory."""

    name: str
    bandwidth: float
    operations: float
    memory: float


@dataclass(frozen=True)
class Model:
    """Of its configuration: layers; parameters of a layer and the head; of a token in a layer's cache."""

    name: str
    layers: int
    layer: float
    head: float
    kv: int


@dataclass(frozen=True)
class DraftKind:
    """Bytes of a weight of layers and of the head, share of the layers left out, and acceptance, from and to.

    ``layer_speed``, ``head_speed``: of products over bfloat16's where they are bound by operations.
    ``window``: tokens of context that drafts attend to; None: all.
    """

    name: str
    layer_bytes: float
    head_bytes: float
    skipped: float
    acceptance: tuple[float, float]
    layer_speed: float = 1.0
    head_speed: float = 1.0
    window: int | None = None


GPUS = (Gpu("H100", 3.35e12, 989e12, 80e9), Gpu("H200", 4.8e12, 989e12, 141e9))
MODELS = (
    Model("Llama-3-8B", 32, 218.1e6, 525.3e6, 2048),
    Model("Llama-3-70B", 80, 855.7e6, 1050.7e6, 2048),
)
DRAFTS = (
    # Published: the paper's mean accepted lengths of 3.7 to 7.2 are about 0.75 to 0.9 a token.
    DraftKind("half of the layers", 2, 2, 0.5, (0.75, 0.9)),
    # Measured here on SmolLM2-135M, and above it: larger models agree more often.
    DraftKind("`fp8`", 1, 1, 0, (0.92, 0.97), 2.0, 2.0),
    DraftKind("`fp8`, a quarter of the layers", 1, 1, 0.25, (0.8, 0.92), 2.0, 2.0),
    # EfficientRollout (arXiv 2606.18967) has 0.90 to 0.94 with 4-bit weights, rounded to the nearest.
    # Layers compute in 16 bits, and the head is fp8.
    DraftKind("`int4`", 4.25 / 8, 1, 0, (0.85, 0.94), 1.0, 2.0),
    # Measured here on SmolLM2-135M with a quarter to two thirds of the context; and the products of both.
    DraftKind("2,048 tokens of context", 2, 2, 0, (0.8, 0.92), window=2048),
    DraftKind("`int4`, 2,048 tokens of context", 4.25 / 8, 1, 0, (0.68, 0.86), 1.0, 2.0, 2048),
)


@dataclass(frozen=True)
class Machine:
    """Some GPUs of a kind, and what is assumed of them.

    Attributes:
        efficiency: share of the data sheet that is reached.
        all_reduce: seconds of one.
        overhead: of a draft's layers.
        host: seconds of a layer at least, where the host calls it.
    """

    gpu: Gpu
    number: int
    efficiency: float
    all_reduce: float
    overhead: float
    host: float

    def seconds(self, parameters: float, weight_bytes: float, rows: float, speed: float = 1.0) -> float:
        """Of the products of some parameters."""
        read = parameters * weight_bytes / (self.gpu.bandwidth * self.efficiency)
        compute = 2 * parameters * rows / (self.gpu.operations * speed * self.efficiency)
        return max(read, compute) / self.number

    def layer_seconds(
        self, model: Model, rows: int, contexts: int, weight_bytes: float = 2, speed: float = 1.0
    ) -> float:
        """Of a layer: its products of ``rows`` tokens, reading ``contexts`` tokens, and its all-reduces."""
        bandwidth = self.gpu.bandwidth * self.efficiency * self.number
        seconds = self.seconds(model.layer, weight_bytes, rows, speed)
        seconds += contexts * 2 * model.kv / bandwidth
        return seconds + (0.0 if self.number == 1 else 2 * self.all_reduce)


def costs(model: Model, machine: Machine, draft: DraftKind, requests: int, context: int) -> Costs:
    """The costs of a batch."""

    def step(tokens: int) -> float:
        rows = requests * (1 + tokens)
        layer = machine.layer_seconds(model, rows, requests * context)
        return model.layers * layer + machine.seconds(model.head, 2, rows)

    seen = min(context, draft.window or context)
    layer = machine.layer_seconds(model, requests, requests * seen, draft.layer_bytes, draft.layer_speed)
    layer *= 1 + machine.overhead
    if requests > LARGEST_GRAPH:
        layer = max(layer, machine.host)
    head = machine.seconds(model.head, draft.head_bytes, requests, draft.head_speed)
    steps = {tokens: step(tokens) for tokens in range(LONGEST + 1)}
    optimize = pass_seconds(model, machine, draft, context) if draft.skipped else None
    return Costs(requests, steps, layer, 0.0, head, 0.0, optimize)


def pass_seconds(model: Model, machine: Machine, draft: DraftKind, context: int) -> float:
    """Of an optimisation pass: draft columns, each with its context, and the target beside other weights."""
    skipped = round(draft.skipped * model.layers)
    columns = (columns_at(layer, skipped) for layer in range(model.layers))
    passes = [(rows, draft.layer_bytes, draft.layer_speed) for rows in columns]
    seconds = machine.seconds(model.head, draft.head_bytes, skipped + 1, draft.head_speed)
    if draft.layer_bytes != 2:
        passes += [(1, 2, 1.0)] * model.layers
        seconds += machine.seconds(model.head, 2, 1)
    for rows, weight_bytes, speed in passes:
        layer = machine.layer_seconds(model, rows, rows * context, weight_bytes, speed)
        seconds += max(layer, machine.host)
    return seconds


def best_ratio(parts: Costs, alpha: float, num_layers: float) -> tuple[float, int]:
    """The largest ratio over the draft lengths, and that length, with passes as the controller has them."""

    def ratio(length: int) -> float:
        masks = 0.0
        if parts.optimize is not None:
            affordable = PASS_SHARE * parts.round(length, length, num_layers)
            rounds = math.ceil(parts.batch * (parts.optimize - parts.draft_step(num_layers)) / affordable)
            masks = min(parts.batch / min(max(rounds, INTERVALS[0]), INTERVALS[1]), MAX_OPTIMIZED_REQUESTS)
        return parts.ratio(expected_tokens(alpha, length), length, length, num_layers, masks)

    return max((ratio(length), length) for length in range(1, LONGEST + 1))


def fits(model: Model, machine: Machine, draft: DraftKind, requests: int, context: int) -> bool:
    """Whether weights, draft weights and the KV cache do."""
    weights = 2 * (model.layers * model.layer + 2 * model.head)
    if draft.layer_bytes != 2:
        weights += model.layers * model.layer * draft.layer_bytes + model.head * draft.head_bytes
    cache = requests * context * 2 * model.kv * model.layers
    return weights + cache < 0.9 * machine.gpu.memory * machine.number


def cell(model: Model, machine: Machine, draft: DraftKind, requests: int, context: int) -> str:
    """What to expect, and the draft lengths that it takes; nothing where it does not fit."""
    if not fits(model, machine, draft, requests, context):
        return ""
    parts = costs(model, machine, draft, requests, context)
    ratios = [best_ratio(parts, alpha, model.layers * (1 - draft.skipped)) for alpha in draft.acceptance]
    if ratios[1][0] < WORTH_IT:
        return "off"
    low = "off" if ratios[0][0] < WORTH_IT else f"{ratios[0][0]:.2f}"
    return f"{low} to {ratios[1][0]:.2f} ({ratios[1][1]})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--efficiency", type=float, default=0.8, help="share of the data sheet reached")
    parser.add_argument("--overhead", type=float, default=0.08, help="of a draft's layers")
    parser.add_argument("--all-reduce", type=float, default=8e-6, help="seconds of one")
    parser.add_argument("--host", type=float, default=2e-4, help="seconds of a layer that the host calls")
    args = parser.parse_args()
    print(
        PAGE.format(
            efficiency=f"{args.efficiency:.0%}",
            overhead=f"{args.overhead:.0%}",
            all_reduce=f"{1e6 * args.all_reduce:.0f}",
            host=f"{1e3 * args.host:.1f}",
            passes=f"{PASS_SHARE:.0%}",
            rarest=f"{INTERVALS[1]:,}",
            largest=LARGEST_GRAPH,
        )
    )
    for model in MODELS:
        for gpu in GPUS:
            for number in TENSOR_PARALLEL:
                machine = Machine(gpu, number, **vars(args))
                if not fits(model, machine, DRAFTS[0], 1, CONTEXTS[0]):
                    continue
                plain = 1000 * costs(model, machine, DRAFTS[0], 1, CONTEXTS[0]).step[0]
                print(f"\n## {model.name}, {number} x {gpu.name}\n")
                print(f"A plain step of one request takes {plain:.2f} ms.\n")
                print(f"| context | drafts | {' | '.join(map(str, REQUESTS))} |")
                print("|---|---|" + "---|" * len(REQUESTS))
                for context in CONTEXTS:
                    for draft in (one for one in DRAFTS if context > (one.window or 0)):
                        cells = [cell(model, machine, draft, requests, context) for requests in REQUESTS]
                        print(f"| {context:,} | {draft.name} | {' | '.join(cells)} |")


PAGE = """\
# Predictions for GPUs

**Not measured.** `scripts/bench/predict.py` wrote this page from the bytes and operations of a pass, at
{efficiency} of what NVIDIA's data sheets promise, with {overhead} more for the layers of a draft and
{all_reduce} µs for an all-reduce: tokens per second over plain decoding's, by requests at once, with the
best draft length of up to 8 (in brackets). **off**: it promises less than 1.05, and the controller does not
speculate. An empty cell does not fit the memory. One of these times has been measured: a plain step of
Llama-3-8B's shape on an H200 took [4.77 ms](benchmarks.md#a-first-look-at-a-gpu) where 3.94 is expected, so
what else a step takes is underestimated.

Drafts are in CUDA graphs up to {largest} requests. Beyond, and in optimisation passes, the host calls one
layer after the other, {host} ms each at least. Passes, for drafts that skip layers, come as often as the
controller has them: for about {passes} of the time, yet once in {rarest} rounds for each request.

What is accepted is assumed, from and to: with half of the layers 0.75 and 0.9 of the tokens (about what the
paper's mean accepted lengths say), with `draft_weights: fp8` 0.92 and 0.97, with a quarter of the layers
skipped besides 0.8 and 0.92, with `int4` 0.85 and 0.94 (EfficientRollout, arXiv 2606.18967, has 0.90 to
0.94), with `draft_context: 2048` at 32,000 tokens 0.8 and 0.92, and with both 0.68 and 0.86.

**What to set**: at low load and short contexts `draft_weights: int4`, or `fp8` where 4 bits agree too rarely.
Skipping layers alone (`method: clasp` and the target's own weights) where there is no memory for draft
weights, and for 8B on eight GPUs, where it promises as much as `int4` or more: all-reduces cost a draft at
any precision what they cost a plain step, and a skipped layer saves its own. At 32,000 tokens of context
`draft_context: auto` besides, from 2 requests for 8B and 4 for 70B on: the KV cache is then most of what a
step reads. Alone it promises as much as `int4` from some 4 requests for 8B and 16 for 70B, with no memory.
Verification is nearly free until operations bound it (some 200 to 300 rows on these GPUs), so all gains fall
off between 16 and 128 requests."""


if __name__ == "__main__":
    main()
