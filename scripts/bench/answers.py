"""Answer by answer beside plain vLLM, from the start on: is a method ever slower?

    .venv/bin/python scripts/bench/answers.py MODEL --spec-bench question.jsonl \
        --method 'clasp={"method":"clasp"}' --output answers.json

Every engine is in a process of its own; all are alive, one works at a time. Each prompt (or each group of
prompts at once) goes to plain vLLM and to every method in turn, in an order that turns with the prompts. What
an engine has learnt it keeps. The table has the ratio of tokens per second to plain vLLM's, over all answers,
the first ones and those after them, with a standard error over the answers; by Spec-Bench's groups, with
repeats the median (range); and the geometric mean of these. With temperature 0 it also counts the answers
that are equal.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from rich.progress import track

from clasp_vllm.bench.report import spread
from clasp_vllm.config import read_settings
from clasp_vllm.tools import spec_bench
from clasp_vllm.tools.options import engine_settings, number, numbers, split_arguments
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
                temperature=group["temperature"],
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
        counters = answer["counters"].items()
        answer["counters"] = {key: n for key, n in counters if n and key.startswith("spec_decode")}
        answer["seconds"] = round(answer["seconds"], 4)
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


def by_kind(groups: list[dict[str, Any]], name: str, kind: str) -> list[float]:
    """Ratios of one of Spec-Bench's groups, by repeat."""
    of_kind = [group for group in groups if group["group"] == kind]
    repeats = sorted({group.get("repeat", 0) for group in of_kind})
    return [ratio([g for g in of_kind if g.get("repeat", 0) == repeat], name) for repeat in repeats]


def accepted(groups: list[dict[str, Any]], name: str) -> tuple[str, str]:
    """Mean accepted length, and the acceptance rate by position, of drafts."""
    totals: Counter[str] = Counter()
    for group in groups:
        totals.update(group[name]["counters"])
    drafts = totals["spec_decode_num_drafts"]
    if not drafts:
        return "", ""
    per_position = (totals[f"spec_decode_num_accepted_tokens_per_pos[{i}]"] / drafts for i in range(8))
    length = 1 + totals["spec_decode_num_accepted_tokens"] / drafts
    return f"{length:.2f}", " ".join(f"{rate:.2f}" for rate in per_position if rate)


def tables(groups: list[dict[str, Any]], names: list[str]) -> str:
    """A table for each load and temperature, in Markdown."""
    places = dict.fromkeys((group.get("temperature", 0.0), group.get("at_once", 1)) for group in groups)
    texts = []
    for temperature, at_once in places:
        here = [
            group
            for group in groups
            if (group.get("temperature", 0.0), group.get("at_once", 1)) == (temperature, at_once)
        ]
        texts.append(f"{at_once} at once, temperature {temperature:g}:\n\n{table(here, names)}")
    return "\n\n".join(texts)


def table(groups: list[dict[str, Any]], names: list[str]) -> str:
    """All methods, in Markdown."""
    kinds = list(dict.fromkeys(group["group"] for group in groups))
    heads = ["method", "all", f"first {FIRST}", "after them", *kinds]
    heads += ["mean"] if len(kinds) > 1 else []
    heads += ["accepted length", "by position", "equal"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name in names:
        cells, done = [with_error(groups, name)], 0
        early = []
        for group in groups:
            early.append(done < FIRST)
            done += group["prompts"]
        for part in (True, False):
            selected = [group for group, first in zip(groups, early, strict=True) if first == part]
            cells.append(with_error(selected, name))
        ratios = [by_kind(groups, name, kind) for kind in kinds]
        cells += [spread(some) for some in ratios]
        if len(kinds) > 1:
            cells.append(f"{statistics.geometric_mean(map(statistics.median, ratios)):.3f}")
        cells += [
            *accepted(groups, name),
            f"{sum(g[name]['equal'] for g in groups)}/{sum(g['prompts'] for g in groups)}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def compact(result: dict[str, Any], groups: list[dict[str, Any]]) -> str:
    """A result as JSON, with a line for each answer (or group of answers)."""
    head = json.dumps(result, indent=1, ensure_ascii=False).removesuffix("\n}")
    return f'{head},\n "answers": [\n  ' + ",\n  ".join(map(json.dumps, groups)) + "\n ]\n}\n"


def start(model: str, methods: dict[str, str], settings: dict[str, Any], logs: Path) -> dict[str, Engine]:
    """Plain vLLM's engine and those of the methods, one after the other: their start is heavy."""
    engines = {}
    for name, config in {PLAIN: "", **methods}.items():
        path = logs / f"{''.join(c if c.isalnum() else '_' for c in name)}.log"
        engines[name] = Engine(name, model, read_settings(config) if config else None, settings, path)
        started = engines[name].answer()
        if "error" in started:
            raise SystemExit(f"{name}: {started['error']}")
    return engines


def workload(engines: dict[str, Engine], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The groups of prompts to ask at once, after a few that warm the engines up."""

    def plain_answer(prompt: list[int]) -> list[int]:
        asked = {"prompts": [{"prompt_token_ids": prompt}], "tokens": args.max_tokens, "ignore_eos": False}
        tokens: list[int] = engines[PLAIN].ask(generate, **asked)["tokens"][0]
        return tokens

    chat = spec_bench.OfflineChat(spec_bench.chat_tokenizer(args.model), plain_answer)
    warm = [chat.render([{"role": "user", "content": f"Count to {n}."}]) for n in (7, 9)]
    for engine, at_once in itertools.product(engines.values(), args.concurrency):
        prompts = [{"prompt_token_ids": chat.tokens(warm[i % 2])} for i in range(at_once)]
        engine.ask(generate, prompts=prompts, tokens=8)
    read = spec_bench.read_questions(args.spec_bench)
    questions = spec_bench.select(read, args.task, args.skip)
    most = max(args.prompts, 2 * max(args.concurrency))
    if args.context:
        tokenizer = spec_bench.chat_tokenizer(args.model)
        questions = spec_bench.after_documents(questions[:most], read, args.context, tokenizer)
        first = {"prompt_token_ids": chat.tokens(spec_bench.prompts(questions, 1, chat)[0])}
        for engine in engines.values():  # the documents are in the prefix cache from then on
            engine.ask(generate, prompts=[first], tokens=1)
    rendered = [chat.tokens(text) for text in spec_bench.prompts(questions, most, chat)]
    groups: list[dict[str, Any]] = []
    places = itertools.product(range(args.repeats), args.temperature, args.concurrency)
    for repeat, temperature, at_once in places:
        for i in range(0, max(args.prompts, 2 * at_once), at_once):
            # But for documents, no prompt is in the prefix cache from an earlier repeat or load.
            salt = {} if args.context else {"cache_salt": f"{repeat} {temperature} {at_once}"}
            prompts = [{"prompt_token_ids": prompt, **salt} for prompt in rendered[i : i + at_once]]
            kind = spec_bench.GROUP_OF[questions[i % len(questions)].category] if at_once == 1 else "mixed"
            place = {"repeat": repeat, "temperature": temperature, "at_once": at_once}
            groups.append({"group": kind, **place, "prompts": prompts})
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="or a result of this script, to print its tables again")
    parser.add_argument("--spec-bench", type=Path, help="Spec-Bench's question.jsonl")
    parser.add_argument("--task", default=spec_bench.TASK, help="spec_bench or spec_bench/GROUP")
    parser.add_argument("--skip", type=number(0), default=0, help="questions of each group to leave out")
    parser.add_argument(
        "--context",
        type=number(0),
        default=0,
        help="ask each question after documents of the file, so many tokens in all, read beforehand",
    )
    parser.add_argument("--prompts", type=number(1), default=36, help="at least; twice the load at least")
    parser.add_argument("--repeats", type=number(1), default=1, help="ask all of them so many times")
    parser.add_argument("--concurrency", type=numbers(1), default=[1], help="prompts at once, e.g. 1,4,16")
    parser.add_argument("--max-tokens", type=number(1), default=96)
    parser.add_argument(
        "--temperature", type=lambda text: [float(part) for part in text.split(",")], default=[0.0]
    )
    parser.add_argument("--ignore-eos", action="store_true", help="all answers as long as allowed")
    parser.add_argument("--method", action="append", default=[], metavar="NAME=CONFIG")
    parser.add_argument("--output", type=Path, help="JSON file for everything")
    parser.epilog = "Arguments after -- are those of vllm serve."
    own_arguments, server_arguments = split_arguments(sys.argv[1:])
    args = parser.parse_args(own_arguments)
    if args.model.endswith(".json"):
        result = json.loads(Path(args.model).read_text())
        print(tables(result["answers"], list(result["methods"])))
        return
    if not args.method or args.spec_bench is None:
        parser.error("--spec-bench and at least one --method are needed")
    methods = dict(text.partition("=")[::2] for text in args.method)
    logs = Path(tempfile.mkdtemp(prefix="answers-"))
    print(f"logs: {logs}", flush=True)
    engines = start(args.model, methods, engine_settings(args.model, server_arguments), logs)
    groups = workload(engines, args)
    measure(engines, groups, args)
    text = tables(groups, list(methods))
    print(text)
    if args.output:
        result = {"about": about(args.model), "methods": methods, "table": text.splitlines()}
        args.output.write_text(compact(result, groups))


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    main()
