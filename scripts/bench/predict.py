"""PREDICTION, not measurement: what speculation gains on GPUs, from bytes, operations and acceptance.

    .venv/bin/python scripts/bench/predict.py > docs/predictions.md

A part of a pass takes the longer of reading its bytes and computing its products, at a share of what the
data sheet promises; tensor parallelism adds two all-reduces a layer. Draft layers, run one by one, take
``overhead`` more: public measurements of vLLM on an H100 (a draft that skips nothing, 0.89 to 0.94 of plain)
say 6 to 11 %.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from clasp_vllm.tools.cost_model import Costs, best_ratio

LONGEST = 8  # draft tokens
WORTH_IT = 1.05  # the controller asks for so much
REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (1_000, 32_000)
TENSOR_PARALLEL = (1, 4, 8)


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

    ``speed``: of products over bfloat16's where they are bound by operations.
    """

    name: str
    layer_bytes: float
    head_bytes: float
    skipped: float
    acceptance: tuple[float, float]
    speed: float = 1.0


GPUS = (Gpu("H100", 3.35e12, 989e12, 80e9), Gpu("H200", 4.8e12, 989e12, 141e9))
MODELS = (
    Model("Llama-3-8B", 32, 218.1e6, 525.3e6, 2048),
    Model("Llama-3-70B", 80, 855.7e6, 1050.7e6, 2048),
)
DRAFTS = (
    # Published: the paper's mean accepted lengths of 3.7 to 7.2 are about 0.75 to 0.9 a token.
    DraftKind("half of the layers", 2, 2, 0.5, (0.75, 0.9)),
    # Measured here on SmolLM2-135M, and above it: larger models agree more often.
    DraftKind("`fp8`", 1, 1, 0, (0.92, 0.97), 2.0),
    DraftKind("`fp8`, a quarter of the layers", 1, 1, 0.25, (0.8, 0.92), 2.0),
    # EfficientRollout (arXiv 2606.18967) has 0.90 to 0.94 with 4-bit weights, rounded to the nearest.
    DraftKind("`int4`", 4.25 / 8, 1, 0, (0.85, 0.94)),
)


@dataclass(frozen=True)
class Machine:
    """Some GPUs of a kind, with shares of the data sheet that are reached."""

    gpu: Gpu
    number: int
    efficiency: float
    all_reduce: float  # seconds

    def seconds(self, parameters: float, weight_bytes: float, rows: float, speed: float = 1.0) -> float:
        """Of the products of some parameters."""
        read = parameters * weight_bytes / (self.gpu.bandwidth * self.efficiency)
        compute = 2 * parameters * rows / (self.gpu.operations * speed * self.efficiency)
        return max(read, compute) / self.number

    def kv_seconds(self, model: Model, requests: int, context: int) -> float:
        """Of a layer's attention to the contexts."""
        return requests * context * 2 * model.kv / (self.gpu.bandwidth * self.efficiency * self.number)

    def reduce_seconds(self) -> float:
        """Of a layer's all-reduces."""
        return 0.0 if self.number == 1 else 2 * self.all_reduce


def costs(
    model: Model, machine: Machine, draft: DraftKind, requests: int, context: int, overhead: float
) -> Costs:
    """The costs of a batch."""

    def step(tokens: int) -> float:
        rows = requests * (1 + tokens)
        layer = machine.seconds(model.layer, 2, rows) + machine.kv_seconds(model, requests, context)
        return model.layers * (layer + machine.reduce_seconds()) + machine.seconds(model.head, 2, rows)

    layer = machine.seconds(model.layer, draft.layer_bytes, requests, draft.speed)
    layer += machine.kv_seconds(model, requests, context) + machine.reduce_seconds()
    head = machine.seconds(model.head, draft.head_bytes, requests, draft.speed)
    steps = {tokens: step(tokens) for tokens in range(LONGEST + 1)}
    return Costs(requests, steps, layer * (1 + overhead), 0.0, head, 0.0)


def fits(model: Model, machine: Machine, draft: DraftKind, requests: int, context: int) -> bool:
    """Whether weights, draft weights and the KV cache do."""
    weights = 2 * (model.layers * model.layer + 2 * model.head)
    if draft.layer_bytes != 2:
        weights += model.layers * model.layer * draft.layer_bytes + model.head * draft.head_bytes
    cache = requests * context * 2 * model.kv * model.layers
    return weights + cache < 0.9 * machine.gpu.memory * machine.number


def cell(
    model: Model, machine: Machine, draft: DraftKind, requests: int, context: int, overhead: float
) -> str:
    """What to expect, and the draft lengths that it takes; nothing where it does not fit."""
    if not fits(model, machine, draft, requests, context):
        return ""
    parts = costs(model, machine, draft, requests, context, overhead)
    kept = model.layers * (1 - draft.skipped)
    ratios = [best_ratio(parts, alpha, kept, LONGEST) for alpha in draft.acceptance]
    if ratios[1][0] < WORTH_IT:
        return "off"
    low = "off" if ratios[0][0] < WORTH_IT else f"{ratios[0][0]:.2f}"
    return f"{low} to {ratios[1][0]:.2f} ({ratios[1][1]})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--efficiency", type=float, default=0.8, help="share of the data sheet reached")
    parser.add_argument("--overhead", type=float, default=0.08, help="of a draft's layers")
    parser.add_argument("--all-reduce", type=float, default=8e-6, help="seconds of one")
    args = parser.parse_args()
    reduce = f"{1e6 * args.all_reduce:.0f}"
    print(
        PAGE.format(efficiency=f"{args.efficiency:.0%}", overhead=f"{args.overhead:.0%}", all_reduce=reduce)
    )
    for model in MODELS:
        for gpu in GPUS:
            for number in TENSOR_PARALLEL:
                machine = Machine(gpu, number, args.efficiency, args.all_reduce)
                if not fits(model, machine, DRAFTS[0], 1, CONTEXTS[0]):
                    continue
                plain = 1000 * costs(model, machine, DRAFTS[0], 1, CONTEXTS[0], 0).step[0]
                print(f"\n## {model.name}, {number} x {gpu.name}\n")
                print(f"A plain step of one request takes {plain:.2f} ms.\n")
                print(f"| context | drafts | {' | '.join(map(str, REQUESTS))} |")
                print("|---|---|" + "---|" * len(REQUESTS))
                for context in CONTEXTS:
                    for draft in DRAFTS:
                        cells = [
                            cell(model, machine, draft, requests, context, args.overhead)
                            for requests in REQUESTS
                        ]
                        print(f"| {context:,} | {draft.name} | {' | '.join(cells)} |")


PAGE = """\
# Predictions for GPUs

**Not measured.** `scripts/bench/predict.py` wrote this page from the bytes and operations of a pass, at
{efficiency} of what NVIDIA's data sheets promise, with {overhead} more for the layers of a draft and
{all_reduce} µs for an all-reduce: tokens per second over plain decoding's, by requests at once, with the
best draft length of up to 8 (in brackets) and drafts in CUDA graphs. **off**: it promises less than 1.05,
and the controller does not speculate. An empty cell does not fit the memory.

What is accepted is assumed, from and to: with half of the layers 0.75 and 0.9 of the tokens (about what the
paper's mean accepted lengths say), with `draft_weights: fp8` 0.92 and 0.97, with a quarter of the layers
skipped besides 0.8 and 0.92, with `int4` 0.85 and 0.94 (EfficientRollout, arXiv 2606.18967, has 0.90 to
0.94).

**What to set**: at low load `draft_weights: int4`, or `fp8` where there is memory for it and 4 bits agree
too rarely; skipping layers alone where there is no memory for draft weights. Verification is nearly free
until operations bound it (some 200 to 300 rows on these GPUs), so the gain falls off between 16 and 128
requests. With long contexts reading the KV cache, which drafts and target do alike, takes most of the gain
of lower precision away, and skipping layers keeps its own. More GPUs for one model leave less to gain:
all-reduces cost a draft as much as a plain step."""


if __name__ == "__main__":
    main()
