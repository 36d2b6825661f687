"""The controller against every fixed setting, and without each of its parts, in one engine in turn.

    .venv/bin/python scripts/bench/settings.py MODEL --tasks spec_bench --spec-bench question.jsonl \
        --output settings.json -- --dtype bfloat16

A fixed setting is a number of layers to skip and of tokens to draft, in every round, each request with masks
of its own unless it says "shared", and drafts as long as that unless it says "exit". Every third measurement
is of the same engine without speculation; ratios are to the mean of the two around them. What a load that
rises and falls comes to is worked out from its levels.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from clasp_vllm.tools import engine as ours
from clasp_vllm.tools import spec_bench
from clasp_vllm.tools.options import engine_settings, number, numbers, split_arguments
from clasp_vllm.tools.prompts import HELD_OUT, TASKS, number_of_prompts, prompts_of, task_prompts
from clasp_vllm.tools.provenance import about

WAVE = {1: 2, 8: 2, 16: 1}  # levels of the load 1-8-16-8-1, and how often each
PARTS = ("n-grams", "length", "sharing", "exit", "speculation", "layers")
VARIANTS = ("shared", "exit")  # of fixed settings
EVERY = 3  # settings between two measurements without speculation
OFF, ALL = "off", "controller"
MIXED = "mixed"  # all tasks in turn


@contextmanager
def changed(controller: Any, name: str) -> Iterator[None]:
    """The controller doing what the setting says."""
    import clasp_vllm.control.gate as module
    from clasp_vllm.control.planner import Choice

    real, lengths, opened, best = controller.choose, controller._lengths, controller._open, module.choose
    kind, _, detail = name.partition(" ")
    if name == OFF:
        controller.choose = lambda *args: Choice(0, 0, False)
    elif kind == "fixed":
        numbers_of, *variants = detail.split()
        skipped, length = map(int, numbers_of.split("x"))
        forced = {
            "budget": controller._budgets.index(skipped),
            "length": length,
            "shared": "shared" in variants,
            "ngram": 0,
            **({} if "exit" in variants else {"floor": 0.0}),
        }
        controller.choose = lambda *args: replace(real(*args), **forced)
    elif detail == "n-grams":
        controller.choose = lambda slots, own, shared, room, _, version: real(
            slots, own, shared, room, None, version
        )
    elif detail == "length":
        controller._lengths = [controller.longest]
    elif detail == "exit":
        controller.choose = lambda *args: replace(real(*args), floor=0.0)
    elif detail == "layers":
        keep = controller._budgets.index(
            len(controller._budgets) * 3 // 4
        )  # half of all, of up to two thirds

        def choose(batch: Any, *args: Any) -> Any:
            never = np.full(batch.layers.shape, 1e9)
            never[:, keep] = batch.layers[:, keep]
            return best(replace(batch, layers=never), *args)

        module.choose = choose
    elif detail in PARTS:
        controller._open = opened - {detail}
    try:
        yield
    finally:
        controller.choose, controller._lengths, controller._open = real, lengths, opened
        module.choose = best


def rate(engine: Any, prompts: Sequence[Any], at_once: int, params: Any) -> float:
    """Tokens per second of answering all prompts, so many at once."""
    waiting, running, tokens = list(enumerate(prompts)), 0, 0
    started = time.perf_counter()
    while waiting or running:
        while waiting and running < at_once:
            i, prompt = waiting.pop(0)
            engine.add_request(f"{i}/{started}", prompt, params)
            running += 1
        done = [output for output in engine.step() if output.finished]
        running -= len(done)
        tokens += sum(len(output.outputs[0].token_ids) for output in done)
    return tokens / (time.perf_counter() - started)


def prompts_for(llm: Any, args: argparse.Namespace) -> dict[tuple[str, int], list[Any]]:
    """Of every task and load, with Spec-Bench's first answers as the engine gives them."""
    loads = {at_once: number_of_prompts(args.prompts, at_once) for at_once in args.concurrency}
    prompts: dict[tuple[str, int], list[Any]] = {}
    for task in args.tasks:
        if spec_bench.is_spec_bench(task):
            chat = spec_bench.OfflineChat(
                spec_bench.chat_tokenizer(args.model),
                lambda prompt: answer(llm, prompt, args),
            )
            questions = spec_bench.select(spec_bench.read_questions(args.spec_bench), task, args.skip)
            texts = spec_bench.prompts(questions, max(loads.values()), chat)
            all_of = [{"prompt_token_ids": chat.tokens(text)} for text in texts]
            prompts |= {(task, at_once): all_of[:count] for at_once, count in loads.items()}
        else:
            prompts |= {(task, at_once): prompts_of(task, count) for at_once, count in loads.items()}
    return prompts


def answer(llm: Any, prompt: list[int], args: argparse.Namespace) -> list[int]:
    """The tokens of the engine's answer."""
    output = llm.generate({"prompt_token_ids": prompt}, params_of(args), use_tqdm=False)[0]
    return list(output.outputs[0].token_ids)


def params_of(args: argparse.Namespace, ignore_eos: bool = False) -> Any:
    """How answers are sampled."""
    from vllm import SamplingParams

    return SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens, ignore_eos=ignore_eos)


def measure(llm: Any, controller: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All settings on all tasks at all loads."""
    engine, names = llm.llm_engine, settings(args.layers, args.lengths, args.variants, args.parts)
    warm_up = [prompt for task in TASKS for prompt in task_prompts(task)[HELD_OUT:]]
    for at_once in args.concurrency:
        rate(engine, warm_up[: 2 * at_once], at_once, params_of(args))
    prompts_at = prompts_for(llm, args)
    measurements = []
    every = itertools.product(range(args.repeats), args.tasks, args.concurrency)
    for repeat, task, at_once in track([*every]):
        prompts = prompts_at[task, at_once]
        # The model ends its answers itself where it is asked as an assistant.
        params = params_of(args, ignore_eos=not spec_bench.is_spec_bench(task))
        order = names[:: (-1) ** repeat]
        groups = [order[i : i + EVERY] for i in range(0, len(order), EVERY)]

        def speed(
            name: str, prompts: Sequence[Any] = prompts, at_once: int = at_once, params: Any = params
        ) -> float:
            with changed(controller, name):
                return rate(engine, prompts, at_once, params)

        off = speed(OFF)
        for group in groups:
            measured = [(name, speed(name)) for name in group]
            before, off = off, speed(OFF)
            measurements += [
                {
                    "setting": name,
                    "task": task,
                    "concurrency": at_once,
                    "repeat": repeat,
                    "tokens_per_second": tokens_per_second,
                    "ratio": tokens_per_second / ((before + off) / 2),
                }
                for name, tokens_per_second in measured
            ]
    return measurements


def start(model: str, config: dict[str, Any], settings: dict[str, Any]) -> Any:
    """An engine in this process."""
    ours.stay_in_process()
    from vllm import LLM

    return LLM(model, speculative_config=config, **settings)


def report(measurements: list[dict[str, Any]], table: str, output: Path | None, model: str) -> None:
    """Print the table, under what was run where, and write all measurements."""
    facts = about(model)
    if output is not None:
        output.write_text(json.dumps({"about": facts, "measurements": measurements}, indent=1) + "\n")
    print("\n".join(f"- {name}: {value}" for name, value in facts.items()))
    print(f"\n{table}")


def settings(
    layers: Sequence[int], lengths: Sequence[int], variants: Sequence[str], parts: Sequence[str]
) -> list[str]:
    """Names of all settings."""
    fixed = [
        f"fixed {skipped}x{length}{variant and ' ' + variant}"
        for skipped, length in itertools.product(layers, lengths)
        for variant in ("", *variants)
    ]
    without = [f"without {part}" for part in parts]
    return [ALL, *fixed, ALL, *without]


def table(measurements: list[dict[str, Any]]) -> str:
    """Median ratios, by setting, task and load, in Markdown."""
    names = list(dict.fromkeys(one["setting"] for one in measurements))
    loads = list(dict.fromkeys((one["task"], one["concurrency"]) for one in measurements))
    wave = {(MIXED, load) for load in WAVE} <= set(loads)
    heads = [f"{load}" if task in (MIXED, spec_bench.TASK) else f"{task}, {load}" for task, load in loads]
    heads += ["1-8-16-8-1"] if wave else []
    lines = [f"| setting | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in names:
        cells = []
        for load in loads:
            ratios = [one["ratio"] for one in _of(measurements, name, *load)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        if wave:
            cells.append(f"{_wave(measurements, name):.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _of(measurements: list[dict[str, Any]], name: str, task: str, load: int) -> list[dict[str, Any]]:
    return [
        one for one in measurements if (one["setting"], one["task"], one["concurrency"]) == (name, task, load)
    ]


def _wave(measurements: list[dict[str, Any]], name: str) -> float:
    """Ratio on the load that rises and falls: as many answers at each level as ``bench`` asks for there."""
    plain = ours = 0.0
    for load, times in WAVE.items():
        rows = _of(measurements, name, MIXED, load)
        speed = statistics.median(one["tokens_per_second"] for one in rows)
        answers = times * number_of_prompts(HELD_OUT, load)
        ours += answers / speed
        plain += answers * statistics.median(one["ratio"] for one in rows) / speed
    return plain / ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument(
        "--tasks",
        type=lambda text: text.split(","),
        default=[MIXED],
        help=f"of {','.join((MIXED, *TASKS))}, {spec_bench.TASK}, {spec_bench.TASK}/GROUP",
    )
    parser.add_argument("--spec-bench", type=Path, help="Spec-Bench's question.jsonl")
    parser.add_argument("--skip", type=number(0), default=0, help="conversations of each group to leave out")
    parser.add_argument("--concurrency", type=numbers(1), default=[1, 2, 4, 8, 16])
    parser.add_argument(
        "--layers",
        type=lambda text: numbers(1)(text) if text else [],
        default=[8, 12, 16],
        help="to skip, of fixed settings; '' for none of these",
    )
    parser.add_argument("--lengths", type=numbers(1), default=[1, 3, 6], help="draft tokens of these")
    parser.add_argument(
        "--variants",
        type=lambda text: text.split(",") if text else [],
        default=[],
        help=f"of fixed settings, in addition (of {','.join(VARIANTS)})",
    )
    parser.add_argument(
        "--parts",
        type=lambda text: text.split(",") if text else [],
        default=list(PARTS),
        help=f"of the controller to go without (default {','.join(PARTS)})",
    )
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repeats", type=number(1), default=2)
    parser.add_argument(
        "--prompts", type=number(1), default=HELD_OUT, help="at least; twice the load at least"
    )
    parser.add_argument("--max-tokens", type=number(1), default=32, help="tokens per answer")
    parser.add_argument("--output", type=Path, help="JSON file for all measurements")
    parser.epilog = "Arguments after -- are those of vllm serve."
    own_arguments, server_arguments = split_arguments(sys.argv[1:])
    args = parser.parse_args(own_arguments)
    of_spec_bench = tuple(filter(spec_bench.is_spec_bench, args.tasks))
    if of_spec_bench and args.spec_bench is None:
        parser.error(f"--tasks {','.join(of_spec_bench)}: needs --spec-bench with the path of question.jsonl")
    for option, chosen, allowed in (
        ("--parts", args.parts, PARTS),
        ("--variants", args.variants, VARIANTS),
        ("--tasks", args.tasks, (MIXED, *TASKS, *of_spec_bench)),
    ):
        unknown = set(chosen) - set(allowed)
        if unknown:
            parser.error(f"{option} {','.join(sorted(unknown))}: allowed are {', '.join(allowed)}")
    llm = start(args.model, {"method": "clasp"}, engine_settings(args.model, server_arguments))
    measurements = measure(llm, ours.drafter(llm).controller, args)
    report(measurements, table(measurements), args.output, args.model)


if __name__ == "__main__":
    main()
