"""What prompt lookup saves, counted and not timed: steps over greedy answers, priced by what steps cost.

    .venv/bin/clasp-vllm costs MODEL --batch 1,2 --json costs.json -- ARGUMENTS
    .venv/bin/python scripts/bench/lookups.py MODEL --spec-bench question.jsonl --costs costs.json \\
        --concurrency 1,2 --output lookups.json -- ARGUMENTS

Plain vLLM answers each question once. Then the answers are written again token by token, as decoding would,
one by one or several of a group at once: with vLLM's lookup (all of a match is verified, up to 5 tokens), and
with as many tokens of it as the controller takes, by what it has learnt of each sequence. A step costs what
it takes with so many requests. The table has plain decoding's time over that of each, by Spec-Bench's groups,
and their geometric mean.
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
from clasp_vllm.tools.options import engine_settings, number, numbers, split_arguments
from clasp_vllm.tools.provenance import about

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

    def take(self, costs: PassCosts, rows: np.ndarray, there: np.ndarray) -> np.ndarray:
        """[rows] how many tokens to verify of matches of so many each."""
        return np.minimum(there, VLLM)

    def learn(self, rows: np.ndarray, accepted: np.ndarray, rejected: np.ndarray) -> None:
        """What became of them."""


class Controlled:
    """The controller's choice."""

    def __init__(self, evidence: AcceptanceEvidence, rows: int) -> None:
        for row in range(rows):
            evidence.start(row)
        self._evidence = evidence

    def take(self, costs: PassCosts, rows: np.ndarray, there: np.ndarray) -> np.ndarray:
        """[rows] how many tokens to verify of matches of so many each."""
        matched = np.flatnonzero(there)
        if not matched.size:
            return there
        ngrams = Ngrams(self._evidence.ngram_acceptance(rows[matched]), there[matched])
        best = ngrams.best(costs, 0, len(rows) - len(matched), range(1, OURS + 1), padded=False)
        return np.minimum(there, best.ngram if best.ratio >= WORTH_IT else 0)

    def learn(self, rows: np.ndarray, accepted: np.ndarray, rejected: np.ndarray) -> None:
        """What became of them."""
        self._evidence.add_ngrams(rows, accepted, rejected)


def seconds(
    answers: list[dict[str, Any]], match: Match, policy: Always | Controlled, costs: dict[int, PassCosts]
) -> float:
    """What writing answers again at once takes, after their first tokens."""
    texts = [np.array(answer["prompt"] + answer["answer"], dtype=np.int32) for answer in answers]
    at, total = np.array([len(answer["prompt"]) + 1 for answer in answers]), 0.0
    while (rows := np.flatnonzero(at < [len(text) for text in texts])).size:
        of = costs[min(batch for batch in costs if batch >= len(rows))]
        found = [match(texts[row], int(at[row])) for row in rows]
        taken = policy.take(of, rows, np.array([len(some) for some in found]))
        rights = [
            texts[row][at[row] : at[row] + n] == some[: min(n, len(texts[row]) - at[row])]
            for row, some, n in zip(rows, found, taken, strict=True)
        ]
        accepted = np.array([int(np.cumprod(right).sum()) for right in rights])
        policy.learn(rows, accepted, accepted < [len(right) for right in rights])
        total += float(of.verify(len(rows) + taken.sum(), 0))
        at[rows] += 1 + accepted
    return total


def lookups(longest_context: int) -> dict[str, Match]:
    """vLLM's lookup, and ours."""
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer

    from clasp_vllm.engine.lookup import PromptLookup

    config: Any = _config(OURS, longest_context)
    ours, theirs = PromptLookup(config), NgramProposer(config)  # with more tokens, of which 5 are taken

    def earliest(tokens: np.ndarray, length: int) -> list[int]:
        found: list[list[int]] = theirs.propose(OURS, [[0]], np.array([length], np.int32), tokens[None])
        return found[0]

    def recent(tokens: np.ndarray, length: int) -> list[int]:
        return ours.matches([0], [length], tokens[None])[0]

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


def step_costs(measured: list[dict[str, Any]]) -> dict[int, PassCosts]:
    """What ``clasp-vllm costs`` measured of steps that verify 0, 1, 2, ... draft tokens, by requests."""
    costs = {}
    for entry in measured:
        batch, steps = entry["batch"], entry["step"]
        tokens = tuple(batch * (1.0 + float(length)) for length in steps)
        costs[batch] = PassCosts((1.0,), (0.0,), (0.0,), tokens, tuple(steps.values()))
    return costs


def batches(written: list[dict[str, Any]], at_once: int) -> list[list[dict[str, Any]]]:
    """So many answers of a group each, the groups in turn."""
    waiting: dict[str, list[dict[str, Any]]] = defaultdict(list)
    full = []
    for answer in written:
        waiting[answer["group"]].append(answer)
        if len(waiting[answer["group"]]) == at_once:
            full.append(waiting.pop(answer["group"]))
    return full


def table(written: list[dict[str, Any]], costs: dict[int, PassCosts], at_once: int) -> str:
    """Plain decoding's time over that of each way, in Markdown."""
    matches = lookups(1 + max(len(answer["prompt"]) + len(answer["answer"]) for answer in written))
    groups = list(dict.fromkeys(answer["group"] for answer in written))

    def by_group(match: Match, policy: Callable[[], Always | Controlled]) -> list[float]:
        times: dict[str, float] = dict.fromkeys(groups, 0.0)
        for batch in batches(written, at_once):
            times[batch[0]["group"]] += seconds(batch, match, policy(), costs)
        return list(times.values())

    def controlled() -> Callable[[], Controlled]:
        evidence = AcceptanceEvidence(at_once, (0,), 1, OURS)
        return lambda: Controlled(evidence, at_once)

    ways = {
        "vLLM's n-gram": by_group(matches["earliest"], Always),
        "controller, earliest match": by_group(matches["earliest"], controlled()),
        "controller, recent match first": by_group(matches["recent"], controlled()),
    }
    plain = by_group(lambda tokens, length: [], Always)
    lines = [f"| {' | '.join(['lookup', *groups, 'mean'])} |", "|" + "---|" * (len(groups) + 2)]
    for name, times in ways.items():
        ratios = [before / after for before, after in zip(plain, times, strict=True)]
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
    parser.add_argument(
        "--concurrency", type=numbers(1), default=[1], help="answers written at once, e.g. 1,2"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the table")
    parser.epilog = "Arguments after -- are those of vllm serve."
    own_arguments, server_arguments = split_arguments(sys.argv[1:])
    args = parser.parse_args(own_arguments)
    measured = json.loads(args.costs.read_text())["costs"]
    costs = step_costs(measured)
    if max(costs) < max(args.concurrency):
        parser.error(f"{args.costs} has costs of {max(costs)} requests at most, not {max(args.concurrency)}")
    questions = spec_bench.select(spec_bench.read_questions(args.spec_bench), spec_bench.TASK, 0)
    stay_in_process()
    settings = engine_settings(args.model, server_arguments)
    written = answers(args.model, questions[: args.prompts], args.max_tokens, settings)
    tables = {at_once: table(written, costs, at_once) for at_once in args.concurrency}
    for at_once, text in tables.items():
        print(f"{at_once} at once:\n\n{text}\n")
    if args.output:
        lines = {at_once: text.splitlines() for at_once, text in tables.items()}
        args.output.write_text(
            json.dumps({"about": about(args.model), "costs": measured, "tables": lines}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
