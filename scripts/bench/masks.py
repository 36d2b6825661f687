"""How good are CLaSp's skip masks? Acceptance at equal budgets, beside fixed sets of layers.

    .venv/bin/python scripts/bench/masks.py MODEL --spec-bench question.jsonl --output masks.json

The model answers Spec-Bench's questions. At every position of the answers a draft predicts the next token
with some layers left out, the past being the full model's, as in a first draft step. The table has the share
of positions where draft and model agree on the likeliest token, and the acceptance to expect at temperature 1
(the sum over tokens of the smaller probability). Masks "as served" come of a pass now and then, and of what
passes before it found, answer after answer. Sets that are searched for are searched on other questions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from clasp_vllm.calibration.acceptance import Acceptance, Text
from clasp_vllm.calibration.search import Trials, swaps
from clasp_vllm.policies.evidence import SkipEvidence
from clasp_vllm.skipping.dynamic_program import Programme, State, backtrack, run_programme
from clasp_vllm.skipping.skip_mask import evenly_spaced_layers
from clasp_vllm.tools import spec_bench
from clasp_vllm.tools.options import number, numbers
from clasp_vllm.tools.provenance import about

Masks = Callable[[int, int, int], Tensor]  # text, positions, budget -> [positions, sub-layers] bool


class DraftAcceptance(Acceptance):
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
    def programme(self, text: Text, budget: int, **evidence: Any) -> Programme:
        """The programme at all positions of the text."""
        embedded = self.begin(text)

        def layer(i: int, state: State) -> State:
            hidden = (state[0] + state[1]).view(-1, *embedded.shape)
            for item in (2 * i, 2 * i + 1):
                hidden = self.run(item, hidden)
            return hidden.view(state[0].shape), torch.zeros_like(state[1])

        state = embedded, torch.zeros_like(embedded)
        return run_programme(state, layer, self.num_layers, budget, **evidence)

    def served(self, budget: int, every: int, memory: float, centred: bool) -> Masks:
        """Masks for all budgets up to this one, as ``policies/clasp.py`` chooses them."""
        evidence = SkipEvidence(1, self.num_layers, budget + 1, memory, torch.device("cpu"))
        slot, choices = torch.zeros(1, dtype=torch.int64), []
        for text in track(self.texts, f"mask_memory {memory:g}{'' if centred else ', not centred'}"):
            choices.append([])
            for first in range(0, text.positions.shape[1], every):
                here = replace(text, positions=text.positions[:, first : first + 1])
                prior = evidence.prior(slot, torch.tensor([first == 0]))
                known = {"prior": prior, "memory": memory, "centre": evidence.centre if centred else None}
                programme = self.programme(here, budget, **known)
                evidence.update(slot, programme.margins, prior, programme.means)
                choices[-1].append(programme.margins > 0)

        def masks(text: int, positions: int, budget: int) -> Tensor:
            skipped = torch.cat([backtrack(choice, budget) for choice in choices[text]])
            return by_layer(skipped.repeat_interleave(every, 0)[:positions])

        return masks

    @torch.inference_mode()
    def score(self, masks: Masks, budget: int = 0) -> tuple[float, float]:
        """Agreement on the likeliest token, and the acceptance to expect at temperature 1."""
        agree, acceptance = [], []
        for index, text in enumerate(self.texts):
            hidden = self.begin(text)[None]
            skipped = masks(index, text.positions.shape[1], budget)
            for item in range(2 * self.num_layers):
                if not skipped[:, item].all():
                    hidden = torch.where(skipped[:, item, None], hidden, self.run(item, hidden))
            logits = self.model.lm_head(self.model.model.norm(hidden[0]))
            agree.append(logits.argmax(-1) == text.logits.argmax(-1))
            acceptance.append(torch.minimum(logits.softmax(-1), text.logits.softmax(-1)).sum(-1))
        return float(torch.cat(agree).float().mean()), float(torch.cat(acceptance).mean())


def by_layer(mask: Tensor) -> Tensor:
    """[..., layers] to [..., sub-layers]."""
    return mask.repeat_interleave(2, -1)


def fixed(layers: Any, num_layers: int) -> Masks:
    """The same layers everywhere."""
    mask = torch.zeros(num_layers, dtype=torch.bool)
    mask[sorted(layers)] = True
    return lambda text, positions, budget: by_layer(mask).expand(positions, -1)


def own(margins: list[Tensor], every: int) -> Masks:
    """Those of the programme at one position, for it and those after it, ``every`` in all."""
    return lambda text, positions, budget: by_layer(
        backtrack(margins[text] > 0, budget)[torch.arange(positions) // every * every]
    )


class Results:
    """Scores by what was judged and by how many layers are left out."""

    def __init__(self, budgets: list[int]) -> None:
        self.budgets = budgets
        self.scores: dict[str, dict[int, Any]] = {}

    def note(self, name: str, budget: int, score: tuple[float, float], layers: Any = None) -> None:
        """Keep a score, and print it."""
        scores = self.scores.setdefault(name, {})
        scores[budget] = {"agreement": score[0], "acceptance": score[1], "layers": layers}
        print(f"{name}, {budget}: {score[0]:.3f} {score[1]:.3f} {layers or ''}", flush=True)

    def table(self, num_layers: int) -> str:
        """All of them, in Markdown."""
        lines = [f"| layers left out of {num_layers} | {' | '.join(map(str, self.budgets))} |"]
        lines.append("|" + "---|" * (len(self.budgets) + 1))
        for name, scores in self.scores.items():
            cells = [
                f"{scores[b]['agreement']:.3f}, {scores[b]['acceptance']:.3f}" if b in scores else ""
                for b in self.budgets
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines)


def fixed_sets(
    drafts: DraftAcceptance, budgets: list[int], trials: int
) -> tuple[dict[str, dict[int, list[int]]], list[float]]:
    """Sets by several rules, by budget; and the score of leaving out each layer alone."""
    num_layers = drafts.num_layers
    sets: dict[str, dict[int, list[int]]] = {"evenly spaced": {}, "single-layer scores": {}, "searched": {}}
    alone = [
        drafts.score(fixed([layer], num_layers))[1] for layer in track(range(num_layers), "single layers")
    ]
    ranked = sorted(range(num_layers), key=lambda layer: -alone[layer])
    for budget in budgets:
        sets["evenly spaced"][budget] = sorted(evenly_spaced_layers(num_layers, budget))
        sets["single-layer scores"][budget] = sorted(ranked[:budget])
        search = Trials(lambda skipped: drafts.score(fixed(skipped, num_layers))[1], trials)
        sets["searched"][budget] = sorted(swaps(search, num_layers, frozenset(ranked[:budget])))
    return sets, alone


def judge_programme(drafts: DraftAcceptance, results: Results, args: argparse.Namespace) -> None:
    """The programme over layers: on the token itself, on one before it, and as served."""
    most = max(args.budgets)
    margins = [drafts.programme(text, most).margins for text in track(drafts.texts, "programme")]
    mean = torch.cat(margins, 2).mean(2, keepdim=True)
    for budget in args.budgets:
        results.note("CLaSp, of the same token", budget, drafts.score(own(margins, 1), budget))
        name = f"CLaSp, one token, every {args.every}"
        results.note(name, budget, drafts.score(own(margins, args.every), budget))
        layers = backtrack(mean > 0, budget)[0].nonzero().flatten().tolist()
        score = drafts.score(fixed(layers, drafts.num_layers))
        results.note("CLaSp, mean over all tokens", budget, score, layers)
    for memory in args.memory:
        for centred in (False, True):
            masks = drafts.served(most, args.every, memory, centred)
            for budget in args.budgets:
                name = f"CLaSp as served, mask_memory {memory:g}{', centred' if centred else ''}"
                results.note(name, budget, drafts.score(masks, budget))


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
    parser.add_argument("--output", type=Path, help="JSON file for everything")
    args = parser.parse_args()
    tokenizer = spec_bench.chat_tokenizer(args.model)
    questions = spec_bench.select(spec_bench.read_questions(args.spec_bench), spec_bench.TASK)
    # Those of one turn, for others need the model's answers first.
    single = [question for question in questions if len(question.turns) == 1]
    prompts = [spec_bench.render(tokenizer, q.messages(lambda _: "")) for q in single]
    judged, searched = prompts[: args.prompts], prompts[args.prompts :][: args.search_prompts]
    results = Results(args.budgets)
    sets, alone = fixed_sets(
        DraftAcceptance(args.model, searched, args.max_tokens), args.budgets, args.trials
    )
    drafts = DraftAcceptance(args.model, judged, args.max_tokens)
    for name, by_budget in sets.items():
        for budget, layers in by_budget.items():
            results.note(name, budget, drafts.score(fixed(layers, drafts.num_layers)), layers)
    judge_programme(drafts, results, args)
    print(results.table(drafts.num_layers))
    if args.output:
        facts = {"about": about(args.model), "alone": alone, "scores": results.scores}
        facts["table"] = results.table(drafts.num_layers).splitlines()
        args.output.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
