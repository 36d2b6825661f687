"""Answer by answer beside plain vLLM, from the start on: is a method ever slower?

    .venv/bin/python scripts/bench/answers.py MODEL --spec-bench question.jsonl \
        --method 'clasp={"method":"clasp"}' --output answers.json

Every engine is in a process of its own; all are alive, one works at a time. Each prompt (or each group of
prompts at once) goes to plain vLLM and to every method in turn, in an order that turns with the prompts. What
an engine has learnt it keeps. The table has the ratio of the sums of seconds over the first answers and over
those after them, with a standard error over the answers, and by Spec-Bench's groups. With temperature 0 it
also counts the answers that are equal.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.progress import track

from clasp_vllm.config import read_settings
from clasp_vllm.tools import spec_bench
from clasp_vllm.tools.options import engine_settings, number, split_arguments
from clasp_vllm.tools.processes import Engine, generate
from clasp_vllm.tools.provenance import about

PLAIN = "plain"
FIRST = 20  # answers


def measure(engines: dict[str, Engine], groups: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Fill in seconds, tokens and counts of every engine for every group of prompts."""
    names = list(engines)
    for i, group in enumerate(track(groups)):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            answer = engines[name].ask(
                generate,
                prompts=group["prompts"],
                tokens=args.max_tokens,
                temperature=args.temperature,
                ignore_eos=args.ignore_eos,
            )
            if "error" in answer:
                raise SystemExit(f"{name}: {answer['error']}")
            group[name] = answer
        summarise(group, names)


def summarise(group: dict[str, Any], names: list[str]) -> None:
    """Keep of answers how long they are and whether they are plain vLLM's, of prompts how many there are."""
    group["prompts"] = len(group["prompts"])
    plain = group[PLAIN]["tokens"]
    for name in names:
        answer = group[name]
        answer["equal"] = sum(a == b for a, b in zip(answer["tokens"], plain, strict=True))
        answer["counters"] = {key: count for key, count in answer["counters"].items() if count}
    for name in names:
        group[name]["tokens"] = sum(map(len, group[name]["tokens"]))


def ratio(groups: list[dict[str, Any]], name: str) -> float:
    """Tokens per second over plain vLLM's."""

    def rate(of: str) -> float:
        return sum(group[of]["tokens"] for group in groups) / sum(group[of]["seconds"] for group in groups)

    return rate(name) / rate(PLAIN)


def with_error(groups: list[dict[str, Any]], name: str) -> str:
    """The ratio and its standard error, by leaving out one answer (or group of answers) after the other."""
    if len(groups) < 2:
        return f"{ratio(groups, name):.3f}" if groups else ""
    without = [ratio(groups[:i] + groups[i + 1 :], name) for i in range(len(groups))]
    error = statistics.pstdev(without) * (len(groups) - 1) ** 0.5
    return f"{ratio(groups, name):.3f} ± {error:.3f}"


def table(groups: list[dict[str, Any]], names: list[str]) -> str:
    """All methods, in Markdown."""
    kinds = list(dict.fromkeys(group["group"] for group in groups))
    lines = [
        f"| method | all | first {FIRST} | after them | {' | '.join(kinds)} | accepted length | equal |",
        "|" + "---|" * (len(kinds) + 6),
    ]
    for name in names:
        cells, done = [with_error(groups, name)], 0
        early = []
        for group in groups:
            early.append(done < FIRST)
            done += group["prompts"]
        for part in (True, False):
            selected = [group for group, first in zip(groups, early, strict=True) if first == part]
            cells.append(with_error(selected, name))
        cells += [f"{ratio([g for g in groups if g['group'] == kind], name):.2f}" for kind in kinds]
        counts = [group[name]["counters"] for group in groups]
        drafts = sum(c.get("spec_decode_num_drafts", 0) for c in counts)
        accepted = sum(c.get("spec_decode_num_accepted_tokens", 0) for c in counts)
        cells += [
            f"{1 + accepted / drafts:.2f}" if drafts else "",
            f"{sum(g[name]['equal'] for g in groups)}/{sum(g['prompts'] for g in groups)}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="or a result of this script, to print its table again")
    parser.add_argument("--spec-bench", type=Path, help="Spec-Bench's question.jsonl")
    parser.add_argument("--task", default=spec_bench.TASK, help="spec_bench or spec_bench/GROUP")
    parser.add_argument("--skip", type=number(0), default=0, help="questions of each group to leave out")
    parser.add_argument("--prompts", type=number(1), default=36)
    parser.add_argument("--concurrency", type=number(1), default=1, help="prompts at once")
    parser.add_argument("--max-tokens", type=number(1), default=96)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--ignore-eos", action="store_true", help="all answers as long as allowed")
    parser.add_argument("--method", action="append", default=[], metavar="NAME=CONFIG")
    parser.add_argument("--output", type=Path, help="JSON file for everything")
    parser.epilog = "Arguments after -- are those of vllm serve."
    own_arguments, server_arguments = split_arguments(sys.argv[1:])
    args = parser.parse_args(own_arguments)
    if args.model.endswith(".json"):
        result = json.loads(Path(args.model).read_text())
        print(table(result["answers"], list(result["methods"])))
        return
    if not args.method or args.spec_bench is None:
        parser.error("--spec-bench and at least one --method are needed")
    methods = dict(text.partition("=")[::2] for text in args.method)
    settings = engine_settings(args.model, server_arguments)
    logs = Path(tempfile.mkdtemp(prefix="answers-"))
    print(f"logs: {logs}", flush=True)
    engines = {}
    for name, config in {PLAIN: None, **methods}.items():  # one after the other: their start is heavy
        path = logs / f"{''.join(c if c.isalnum() else '_' for c in name)}.log"
        engines[name] = Engine(name, args.model, config and read_settings(config), settings, path)
        started = engines[name].answer()
        if "error" in started:
            raise SystemExit(f"{name}: {started['error']}")

    def plain_answer(prompt: list[int]) -> list[int]:
        asked = {"prompts": [{"prompt_token_ids": prompt}], "tokens": args.max_tokens, "ignore_eos": False}
        tokens: list[int] = engines[PLAIN].ask(generate, **asked)["tokens"][0]
        return tokens

    chat = spec_bench.OfflineChat(spec_bench.chat_tokenizer(args.model), plain_answer)

    def prompt_of(text: str) -> dict[str, list[int]]:
        return {"prompt_token_ids": chat.tokens(text)}

    questions = spec_bench.select(spec_bench.read_questions(args.spec_bench), args.task, args.skip)
    rendered = spec_bench.prompts(questions, args.prompts, chat)
    group_of = {category: group for group, categories in spec_bench.GROUPS.items() for category in categories}
    groups: list[dict[str, Any]] = []
    for i in range(0, len(rendered), args.concurrency):
        batch = rendered[i : i + args.concurrency]
        kind = group_of[questions[i % len(questions)].category] if args.concurrency == 1 else "mixed"
        groups.append({"group": kind, "prompts": [prompt_of(prompt) for prompt in batch]})
    warm = [prompt_of(chat.render([{"role": "user", "content": f"Count to {n}."}])) for n in (7, 9)]
    for engine in engines.values():
        engine.ask(generate, prompts=warm[:1], tokens=8)
        engine.ask(generate, prompts=warm * (-(-args.concurrency // 2)), tokens=8)
    measure(engines, groups, args)
    text = table(groups, [name for name in engines if name != PLAIN])
    print(text)
    if args.output:
        result = {
            "about": about(args.model),
            "methods": methods,
            "table": text.splitlines(),
            "answers": groups,
        }
        args.output.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    main()
