"""How good are CLaSp's skip masks? Acceptance at equal budgets, beside fixed sets of layers.

    .venv/bin/python scripts/bench/masks.py MODEL --spec-bench question.jsonl --output masks.json

The model answers Spec-Bench's questions. At every position of the answers a draft predicts the next token
with some layers left out, the past being the full model's, as in a first draft step. The table has the share
of positions where draft and model agree on the likeliest token, and the acceptance to expect at temperature 1
(the sum over tokens of the smaller probability). Sets that are searched for are searched on other questions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from clasp_vllm.bench import spec_bench
from clasp_vllm.bench.about import about
from clasp_vllm.bench.options import number, numbers
from clasp_vllm.calibration.acceptance import Acceptance, Text
from clasp_vllm.calibration.search import Trials, swaps
from clasp_vllm.drafting.evidence import SkipEvidence
from clasp_vllm.skipping.dynamic_program import State, backtrack, run_programme
from clasp_vllm.skipping.items import Items
from clasp_vllm.skipping.mask import evenly_spaced_layers

Masks = Callable[[int, int], Tensor]  # text, positions -> [positions, sub-layers] bool


class Drafts(Acceptance):
    """Drafts whose skip mask differs from position to position."""

    @torch.inference_mode()
    def begin(self, text: Text) -> Tensor:
        """[positions, hidden_size] embeddings. What follows is of this text."""

        class Begun(Exception):
            pass

        given: dict[str, Any] = {}

        def stop(module: Any, inputs: tuple[Tensor, ...], more: dict[str, Any]) -> None:
            given.update(more, hidden=inputs[0] if inputs else more["hidden_states"])
            raise Begun

        hook = self.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.logits(text)
        except Begun:
            pass
        finally:
            hook.remove()
        self._rotary = given["position_embeddings"]
        return given["hidden"][0]

    def run(self, item: int, hidden: Tensor) -> Tensor:
        """Attention (even) or MLP (odd) of layer ``item // 2`` on [columns, positions, hidden_size]."""
        layer, is_mlp = self.layers[item // 2], item % 2
        if is_mlp:
            return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        normed = layer.input_layernorm(hidden)
        added, _ = layer.self_attn(normed, position_embeddings=self._rotary, attention_mask=None)
        return hidden + added

    @torch.inference_mode()
    def programme(self, text: Text, budget: int, costs: tuple[int, ...] = ()) -> Tensor:
        """[items, budget + 1, positions] margins of the programme everywhere, by layer or sub-layer."""
        embedded = self.begin(text)

        def layer(i: int, state: State) -> State:
            hidden = (state[0] + state[1]).view(-1, *embedded.shape)
            for item in [i] if costs else [2 * i, 2 * i + 1]:
                hidden = self.run(item, hidden)
            return hidden.view(state[0].shape), torch.zeros_like(state[1])

        state = embedded, torch.zeros_like(embedded)
        items = len(costs) or self.num_layers
        return run_programme(state, layer, items, budget, costs=costs).margins

    @torch.inference_mode()
    def score(self, masks: Masks) -> tuple[float, float]:
        """Agreement on the likeliest token, and the acceptance to expect at temperature 1."""
        agree, law = [], []
        for index, text in enumerate(self.texts):
            hidden = self.begin(text)[None]
            skipped = masks(index, text.positions.shape[1])
            for item in range(2 * self.num_layers):
                if not skipped[:, item].all():
                    hidden = torch.where(skipped[:, item, None], hidden, self.run(item, hidden))
            logits = self.model.lm_head(self.model.model.norm(hidden[0]))
            agree.append(logits.argmax(-1) == text.logits.argmax(-1))
            law.append(torch.minimum(logits.softmax(-1), text.logits.softmax(-1)).sum(-1))
        return float(torch.cat(agree).float().mean()), float(torch.cat(law).mean())


def by_layer(mask: Tensor) -> Tensor:
    """[..., layers] to [..., sub-layers]."""
    return mask.repeat_interleave(2, -1)


def fixed(layers: Any, num_layers: int) -> Masks:
    """The same layers everywhere."""
    mask = torch.zeros(num_layers, dtype=torch.bool)
    mask[sorted(layers)] = True
    return lambda text, positions: by_layer(mask).expand(positions, -1)


def own(margins: list[Tensor], budget: int, every: int) -> Masks:
    """Those of the programme at one position, for it and those after it, ``every`` in all."""
    return lambda text, positions: by_layer(
        backtrack(margins[text] > 0, budget)[torch.arange(positions) // every * every]
    )


def averaged(
    margins: list[Tensor], budget: int, every: int, memory: float, costs: tuple[int, ...] = ()
) -> Masks:
    """As served: averages over passes, of the text and, where it begins, of those before it."""
    items, columns, _ = margins[0].shape
    evidence = SkipEvidence(1, items, columns, memory, torch.device("cpu"))
    slot = torch.zeros(1, dtype=torch.int64)

    def masks(text: int, positions: int) -> Tensor:
        found = torch.empty(positions, items, dtype=torch.bool)
        for first in range(0, positions, every):
            prior = evidence.prior(slot, torch.tensor([first == 0]))
            blended = margins[text][:, :, first : first + 1]
            if prior is not None:
                blended = blended.lerp(prior, memory)
            evidence.update(slot, blended, prior)
            found[first : first + every] = backtrack(blended > 0, budget, costs)
        return found if costs else by_layer(found)

    return masks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="of the Llama family")
    parser.add_argument("--spec-bench", type=Path, required=True, help="Spec-Bench's question.jsonl")
    parser.add_argument("--prompts", type=number(1), default=30, help="to judge by, of all groups in turn")
    parser.add_argument("--search-prompts", type=number(1), default=12, help="others, to search with")
    parser.add_argument("--max-tokens", type=number(2), default=64, help="tokens of each answer")
    parser.add_argument("--budgets", type=numbers(1), default=[3, 5, 8, 12], help="layers to skip")
    parser.add_argument("--every", type=number(1), default=8, help="positions between two passes")
    parser.add_argument(
        "--memory",
        type=lambda text: [float(one) for one in text.split(",")],
        default=[0.8, 0.9],
        help="mask_memory, several separated by commas",
    )
    parser.add_argument("--trials", type=number(1), default=60, help="sets to try for each budget")
    parser.add_argument(
        "--sublayers", type=numbers(1), default=[], help="budgets to run the programme over sub-layers for"
    )
    parser.add_argument("--output", type=Path, help="JSON file for everything")
    args = parser.parse_args()
    tokenizer = spec_bench.chat_tokenizer(args.model)
    questions = spec_bench.select(spec_bench.read_questions(args.spec_bench), spec_bench.TASK)
    # Those of one turn, for others need the model's answers first.
    single = [question for question in questions if len(question.turns) == 1]
    prompts = [spec_bench.render(tokenizer, q.messages(lambda _: "")) for q in single]
    judged, searched = prompts[: args.prompts], prompts[args.prompts :][: args.search_prompts]
    found: dict[str, dict[int, Any]] = {}

    def note(what: str, budget: int, score: tuple[float, float], layers: Any = None) -> None:
        found.setdefault(what, {})[budget] = {"agreement": score[0], "acceptance": score[1], "layers": layers}
        print(f"{what}, {budget}: {score[0]:.3f} {score[1]:.3f} {layers or ''}", flush=True)

    # Fixed sets are looked for first, on texts of their own.
    drafts = Drafts(args.model, searched, args.max_tokens)
    num_layers = drafts.num_layers
    sets: dict[str, dict[int, Any]] = {"evenly spaced": {}, "single-layer scores": {}, "searched": {}}
    alone = [
        drafts.score(fixed([layer], num_layers))[1] for layer in track(range(num_layers), "single layers")
    ]
    ranked = sorted(range(num_layers), key=lambda layer: -alone[layer])
    for budget in args.budgets:
        sets["evenly spaced"][budget] = evenly_spaced_layers(num_layers, budget)
        sets["single-layer scores"][budget] = sorted(ranked[:budget])
        trials = Trials(lambda skipped: drafts.score(fixed(skipped, num_layers))[1], args.trials)
        sets["searched"][budget] = sorted(swaps(trials, num_layers, frozenset(ranked[:budget])))
    del drafts
    drafts = Drafts(args.model, judged, args.max_tokens)
    for what, by_budget in sets.items():
        for budget, layers in by_budget.items():
            note(what, budget, drafts.score(fixed(layers, num_layers)), list(layers))
    most = max(args.budgets)
    margins = [drafts.programme(text, most) for text in track(drafts.texts, "programme")]
    mean = torch.cat(margins, 2).mean(2, keepdim=True)
    for budget in args.budgets:
        note("CLaSp, of the same token", budget, drafts.score(own(margins, budget, 1)))
        note(f"CLaSp, one token, every {args.every}", budget, drafts.score(own(margins, budget, args.every)))
        for memory in args.memory:
            masks = averaged(margins, budget, args.every, memory)
            note(f"CLaSp, mask_memory {memory:g}, every {args.every}", budget, drafts.score(masks))
        layers = backtrack(mean > 0, budget)[0].nonzero().flatten().tolist()
        note("CLaSp, mean over all tokens", budget, drafts.score(fixed(layers, num_layers)), layers)
    if args.sublayers:
        layer = drafts.layers[0]
        attention, mlp = (sum(w.numel() for w in part.parameters()) for part in (layer.self_attn, layer.mlp))
        items = Items.sublayers(num_layers, mlp / attention)
        margins = [
            drafts.programme(text, items.units * max(args.sublayers), items.costs)
            for text in track(drafts.texts, "sub-layers")
        ]
        for budget in args.sublayers:
            masks = averaged(margins, items.units * budget, args.every, args.memory[-1], items.costs)
            note(f"CLaSp over sub-layers, mask_memory {args.memory[-1]:g}", budget, drafts.score(masks))
    lines = [f"| layers left out of {num_layers} | {' | '.join(map(str, args.budgets))} |"]
    lines.append("|" + "---|" * (len(args.budgets) + 1))
    for what, by_budget in found.items():
        cells = [
            f"{by_budget[b]['agreement']:.3f}, {by_budget[b]['acceptance']:.3f}" if b in by_budget else ""
            for b in args.budgets
        ]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    print("\n".join(lines))
    if args.output:
        facts = {"about": about(args.model), "table": lines, "alone": alone, "found": found}
        args.output.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
