"""How often do drafts by quantised weights say what the target says?

    .venv/bin/python scripts/bench/precision.py MODEL --spec-bench question.jsonl --output precision.json

The model answers Spec-Bench's questions. At every position of the answers a draft of other precision predicts
the next token, the past being the full model's, as in a first draft step. The table has the share of
positions where draft and model agree on the likeliest token, and the acceptance to expect at temperature 1
(the sum over tokens of the smaller probability), for all linear layers and the head, for the layers alone,
and with layers left out besides: those whose single loss costs least. With --each also the agreement with
each layer quantised by itself.

What kernels do to inputs is repeated in float32 here, but for the kernel that this machine would draft with,
which is run itself (``engine/precisions.py``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from masks import DraftAcceptance, fixed
from rich.progress import track
from torch import Tensor, nn

from clasp_vllm.engine.precisions import fastest_int8
from clasp_vllm.tools import spec_bench
from clasp_vllm.tools.options import number, numbers
from clasp_vllm.tools.provenance import about

Product = Callable[[Tensor], Tensor]  # [rows, inputs] to [rows, outputs]
GROUP = 64  # weights with a scale of their own, at 4 bits


def rounded(x: Tensor, largest: int) -> Tensor:
    """Symmetric, with a scale for each row."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / largest
    return (x / scale).round() * scale


def weight_only(weight: Tensor) -> Product:
    """int8, inputs as they are."""
    weight = rounded(weight, 127)
    return lambda x: x @ weight.t()


def int8_by_row(weight: Tensor) -> Product:
    """int8, inputs too: vLLM's kernels."""
    weight = rounded(weight, 127)
    return lambda x: rounded(x, 127) @ weight.t()


def int8_here(weight: Tensor) -> Product:
    """int8 by the kernel that drafts on this machine, a row at a time."""
    product = fastest_int8(weight)(group_size=0)
    product.load(weight)
    return lambda x: torch.cat([product(row[None], None) for row in x])


def fp8_by_row(weight: Tensor) -> Product:
    """fp8 e4m3, inputs too."""

    def cast(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
        return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale

    weight = cast(weight)
    return lambda x: cast(x) @ weight.t()


def int4_groups(weight: Tensor) -> Product:
    """Symmetric int4 in groups of inputs, inputs as they are."""
    weight = rounded(weight.view(len(weight), -1, GROUP), 7).view_as(weight)
    return lambda x: x @ weight.t()


KINDS: dict[str, Callable[[Tensor], Product]] = {
    "int8, the kernel here": int8_here,
    "int8, inputs by row (vLLM's kernels)": int8_by_row,
    "int8, weights only": weight_only,
    "fp8 e4m3, inputs by row": fp8_by_row,
    f"int4, groups of {GROUP}, weights only": int4_groups,
}


class Quantised(nn.Module):
    """A linear layer of a draft."""

    def __init__(self, linear: nn.Linear, make: Callable[[Tensor], Product]) -> None:
        super().__init__()
        self._product, self._bias = make(linear.weight.detach()), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        out = self._product(x.flatten(0, -2)).view(*x.shape[:-1], -1)
        return out if self._bias is None else out + self._bias


@contextmanager
def quantised(model: nn.Module, names: Iterable[str], make: Callable[[Tensor], Product]) -> Iterator[None]:
    """``model`` with these linear layers quantised."""
    originals = {name: model.get_submodule(name) for name in names}
    try:
        for name, linear in originals.items():
            assert isinstance(linear, nn.Linear)
            model.set_submodule(name, Quantised(linear, make))
        yield
    finally:
        for name, linear in originals.items():
            model.set_submodule(name, linear)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="of the Llama family")
    parser.add_argument("--spec-bench", type=Path, required=True, help="Spec-Bench's question.jsonl")
    parser.add_argument("--prompts", type=number(1), default=19, help="of all groups in turn")
    parser.add_argument("--max-tokens", type=number(2), default=48, help="tokens of each answer")
    parser.add_argument("--skipped", type=numbers(0), default=[0, 1, 2, 4], help="layers left out besides")
    parser.add_argument(
        "--best", type=numbers(0), help="those to leave out, best first (default: found by leaving out each)"
    )
    parser.add_argument("--each", action="store_true", help="also quantise each layer by itself")
    parser.add_argument("--output", type=Path, help="JSON file for everything")
    args = parser.parse_args()
    tokenizer = spec_bench.chat_tokenizer(args.model)
    questions = spec_bench.select(spec_bench.read_questions(args.spec_bench), spec_bench.TASK)
    single = [question for question in questions if len(question.turns) == 1]
    prompts = [spec_bench.render(tokenizer, q.messages(lambda _: "")) for q in single[: args.prompts]]
    drafts = DraftAcceptance(args.model, prompts, args.max_tokens)
    every, best = range(drafts.num_layers), args.best
    if best is None:
        alone = [drafts.score(fixed([i], drafts.num_layers))[1] for i in track(every, "each layer left out")]
        best = sorted(every, key=alone.__getitem__, reverse=True)
    linears = [name for name, module in drafts.model.named_modules() if isinstance(module, nn.Linear)]
    layers = [name for name in linears if name != "lm_head"]
    scores: dict[str, dict[str, tuple[float, float]]] = {}
    rows = [f"| weights | {' | '.join(f'{n} left out' for n in args.skipped)} | layers alone |"]
    rows.append("|---" * (len(args.skipped) + 2) + "|")
    for kind, make in KINDS.items():
        with quantised(drafts.model, linears, make):
            skips = [drafts.score(fixed(best[:n], drafts.num_layers)) for n in track(args.skipped, kind)]
        with quantised(drafts.model, layers, make):
            skips.append(drafts.score(fixed([], drafts.num_layers)))
        scores[kind] = dict(zip([*map(str, args.skipped), "layers alone"], skips, strict=True))
        rows.append(f"| {kind} | {' | '.join(f'{a:.3f}, {t:.3f}' for a, t in skips)} |")
    by_layer: list[float] = []
    for i in track(every if args.each else (), "each layer by itself"):
        own = [name for name in layers if f".layers.{i}." in f".{name}"]
        with quantised(drafts.model, own, KINDS["int8, the kernel here"]):
            by_layer.append(drafts.score(fixed([], drafts.num_layers))[0])
    print(*rows, "", "each layer by itself: " + " ".join(f"{x:.3f}" for x in by_layer), sep="\n")
    if args.output:
        facts = {"about": about(args.model), "scores": scores, "by_layer": by_layer, "table": rows}
        args.output.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
