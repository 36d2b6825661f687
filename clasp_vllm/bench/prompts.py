"""What measurements ask: the package's own tasks, a stream of all of them, and Spec-Bench."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from clasp_vllm.bench.options import levels

TASKS = ("maths", "code", "prose", "sql", "json")
HELD_OUT = 5  # measurements ask a task's first prompts; calibration may look at those from here on
WARM_UP = "warm-up"  # a task of the prompts held out


def task_prompts(task: str) -> list[str]:
    """The prompts of one of the tasks that come with the package."""
    lines = Path(__file__).with_name("tasks").joinpath(f"{task}.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def read_prompts(path: Path, option: str) -> list[str]:
    """The prompts of a file of lines {"prompt": "..."}.

    Raises:
        ValueError: it is something else; the message begins with ``option``.
    """
    try:
        prompts = [json.loads(line)["prompt"] for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{option}: not lines {{"prompt": "..."}} ({error!r})') from None
    if not prompts or not all(isinstance(prompt, str) and prompt for prompt in prompts):
        raise ValueError(f'{option}: holds no prompts; allowed are lines {{"prompt": "..."}}')
    return prompts


def mixed_prompts(count: int) -> list[str]:
    """Prompts of all tasks in turn: maths, code, prose, SQL, JSON, maths, ... From the start if too many."""
    tasks = [task_prompts(task)[:HELD_OUT] for task in TASKS]
    prompts = [prompt for group in zip(*tasks, strict=True) for prompt in group]
    return [prompts[i % len(prompts)] for i in range(count)]


def number_of_prompts(prompts: int, concurrency: int) -> int:
    """Enough to keep as many requests running for most of the time."""
    return max(prompts, 2 * concurrency)


def datasets(args: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """Options of `vllm bench serve` for each task, apart from the number of prompts."""
    found = {}
    for task in (WARM_UP, *args.tasks):
        if task.startswith("spec_bench/"):
            found[task] = [
                "--dataset-name=spec_bench",
                f"--dataset-path={args.spec_bench}",
                f"--spec-bench-category={task.removeprefix('spec_bench/')}",
                f"--spec-bench-output-len={args.max_tokens}",
            ]
            continue
        at_once = max(level for load in args.concurrency for level in levels(load))
        longest = number_of_prompts(args.prompts, at_once)
        if task == WARM_UP:
            few = [prompt for known in TASKS for prompt in task_prompts(known)[HELD_OUT:]]
        else:
            few = mixed_prompts(len(TASKS) * HELD_OUT) if task == "mixed" else task_prompts(task)[:HELD_OUT]
        prompts = [few[i % len(few)] for i in range(longest)]
        path = folder / f"{task}.jsonl"
        path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        found[task] = [
            "--dataset-name=custom",
            f"--dataset-path={path}",
            f"--custom-output-len={args.max_tokens}",
        ]
    return found
