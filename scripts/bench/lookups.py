"""What prompt lookup saves, counted and not timed: steps over greedy answers, priced by what steps cost.

    .venv/bin/clasp-vllm costs MODEL --json costs.json -- ARGUMENTS
    .venv/bin/python scripts/bench/lookups.py MODEL --spec-bench question.jsonl --costs costs.json \\
        --output lookups.json -- ARGUMENTS

Plain vLLM answers each question once. Then the answers are written again token by token, as decoding would:
with vLLM's lookup (all of a match is verified, up to 5 tokens), and with as many tokens of it as the
controller takes, by what it has learnt of the sequence. A step costs what it takes with one request.
The table has plain decoding's time over that of each, by Spec-Bench's groups, and their geometric mean.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from clasp_vllm.control.acceptance import AcceptanceEvidence
from clasp_vllm.control.costs import PassCosts
from clasp_vllm.control.planner import WORTH_IT, Ngrams
from clasp_vllm.tools import spec_bench
from clasp_vllm.tools.engine import stay_in_process
from clasp_vllm.tools.options import engine_settings, number, split_arguments
from clasp_vllm.tools.provenance import about

ROW = np.zeros(1, dtype=np.int64)  # there is one sequence
VLLM, OURS = 5, 8  # tokens of a match at most
Match = Callable[[np.ndarray, int], list[int]]  # of tokens, of which there are so many


def answers(model: str, questions: list[Any], tokens: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Each question's group, prompt and greedy answer."""
    from vllm import LLM, SamplingParams

    llm = LLM(model, **settings)
    params = SamplingParams(temperature=0.0, max_tokens=tokens)

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        return [list(output.outputs[0].token_ids) for output in outputs]

    chat = spec_bench.OfflineChat(spec_bench.chat_tokenizer(model), lambda prompt: generate([prompt])[0])
    prompts = [chat.tokens(text) for text in spec_bench.prompts(questions, len(questions), chat)]
    return [
        {"group": spec_bench.GROUP_OF[question.category], "prompt": prompt, "answer": answer}
        for question, prompt, answer in zip(questions, prompts, generate(prompts), strict=True)
    ]


class Always:
    """vLLM's ``method: ngram``."""

    def take(self, costs: PassCosts, there: int) -> int:
        """Of the tokens of a match, how many to verify."""
        return min(there, VLLM)

    def learn(self, taken: int, accepted: int) -> None:
        """What became of them."""


class Controlled:
    """The controller's choice for one sequence."""

    def __init__(self, evidence: AcceptanceEvidence) -> None:
        evidence.start(0)
        self._evidence = evidence

    def take(self, costs: PassCosts, there: int) -> int:
        """Of the tokens of a match, how many to verify."""
        ngrams = Ngrams(self._evidence.ngram_acceptance(ROW), np.array([there]))
        best = ngrams.best(costs, 0, 0, OURS, padded=False)
        return min(best.ngram, there) if best.ratio >= WORTH_IT else 0

    def learn(self, taken: int, accepted: int) -> None:
        """What became of them."""
        if taken:
            self._evidence.add_ngrams(ROW, np.array([accepted]), np.array([accepted < taken]))


def seconds(answer: dict[str, Any], match: Match, policy: Always | Controlled, costs: PassCosts) -> float:
    """What writing an answer again takes, after its first token."""
    prompt, tokens = len(answer["prompt"]), np.array(answer["prompt"] + answer["answer"], dtype=np.int32)
    at, total = prompt + 1, 0.0
    while at < len(tokens):
        found = match(tokens, at)
        taken = policy.take(costs, len(found)) if found else 0
        right = np.array(found[:taken], dtype=np.int32)[: len(tokens) - at]
        wrong = np.flatnonzero(right != tokens[at : at + len(right)])
        accepted = int(wrong[0]) if wrong.size else len(right)
        policy.learn(taken, accepted)
        total += float(costs.verify(1 + taken, 0))
        at += 1 + accepted
    return total


def lookups(longest_context: int) -> dict[str, Match]:
    """vLLM's lookup, and ours."""
    from clasp_vllm.engine.lookup import PromptLookup

    ours = PromptLookup(_config(OURS, longest_context))  # type: ignore[arg-type]
    theirs = ours._proposer  # noqa: SLF001 - the same with more tokens, of which 5 are taken

    def earliest(tokens: np.ndarray, length: int) -> list[int]:
        found: list[list[int]] = theirs.propose(OURS, [[0]], np.array([length], np.int32), tokens[None])
        return found[0]

    def recent(tokens: np.ndarray, length: int) -> list[int]:
        return ours.matches([0], np.array([length]), tokens[None])[0]

    return {"earliest": earliest, "recent": recent}


def _config(longest: int, longest_context: int) -> SimpleNamespace:
    """As much of vLLM's configuration as its lookup reads, with its keys' defaults here."""
    return SimpleNamespace(
        speculative_config=SimpleNamespace(
            prompt_lookup_min=2, prompt_lookup_max=4, num_speculative_tokens=longest
        ),
        model_config=SimpleNamespace(max_model_len=longest_context),
        scheduler_config=SimpleNamespace(max_num_seqs=1),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )


def step_costs(path: Path) -> PassCosts:
    """What ``clasp-vllm costs`` measured of steps that verify 0, 1, 2, ... draft tokens, with one request."""
    steps = next(costs["step"] for costs in json.loads(path.read_text())["costs"] if costs["batch"] == 1)
    tokens = tuple(1.0 + float(length) for length in steps)
    return PassCosts((1.0,), (0.0,), (0.0,), tokens, tuple(steps.values()))


def table(written: list[dict[str, Any]], costs: PassCosts) -> str:
    """Plain decoding's time over that of each way, in Markdown."""
    matches = lookups(1 + max(len(answer["prompt"]) + len(answer["answer"]) for answer in written))
    evidence = {name: AcceptanceEvidence(1, (0,), 1, OURS) for name in matches}
    ways = {
        "vLLM's n-gram": (matches["earliest"], Always),
        "controller, earliest match": (matches["earliest"], lambda: Controlled(evidence["earliest"])),
        "controller, recent match first": (matches["recent"], lambda: Controlled(evidence["recent"])),
    }
    groups = list(dict.fromkeys(answer["group"] for answer in written))
    lines = [f"| {' | '.join(['lookup', *groups, 'mean'])} |", "|" + "---|" * (len(groups) + 2)]
    for name, (match, policy) in ways.items():
        plain, spent = defaultdict(float), defaultdict(float)
        for answer in written:
            plain[answer["group"]] += float(costs.plain(1, 0)) * (len(answer["answer"]) - 1)
            spent[answer["group"]] += seconds(answer, match, policy(), costs)
        ratios = [plain[group] / spent[group] for group in groups]
        cells = [f"{ratio:.3f}" for ratio in (*ratios, statistics.geometric_mean(ratios))]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--spec-bench", type=Path, required=True, help="Spec-Bench's question.jsonl")
    parser.add_argument("--costs", type=Path, required=True, help="what clasp-vllm costs wrote")
    parser.add_argument("--prompts", type=number(1), default=72)
    parser.add_argument("--max-tokens", type=number(1), default=128)
    parser.add_argument("--output", type=Path, help="JSON file for the table")
    parser.epilog = "Arguments after -- are those of vllm serve."
    own_arguments, server_arguments = split_arguments(sys.argv[1:])
    args = parser.parse_args(own_arguments)
    questions = spec_bench.select(spec_bench.read_questions(args.spec_bench), spec_bench.TASK, 0)
    stay_in_process()
    settings = engine_settings(args.model, server_arguments)
    written = answers(args.model, questions[: args.prompts], args.max_tokens, settings)
    text = table(written, step_costs(args.costs))
    print(text)
    if args.output:
        result = {"about": about(args.model), "costs": json.loads(args.costs.read_text())["costs"]}
        args.output.write_text(json.dumps(result | {"table": text.splitlines()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
