"""What measurements ask: the package's own tasks, a stream of all of them, and Spec-Bench."""

from __future__ import annotations

import argparse
import json
from itertools import count, cycle, islice
from pathlib import Path

from clasp_vllm.tools import spec_bench
from clasp_vllm.tools.options import levels

TASKS = ("maths", "code", "prose", "sql", "json")
HELD_OUT = 5  # measurements ask a task's first prompts; calibration may look at those from here on
ALL_PROMPTS = len(TASKS) * HELD_OUT
GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, fill the unit interval evenly
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


def mixed_prompts(count: int, ratio: float = 1.0) -> list[str]:
    """A stream of the prompts of all tasks, from the start again if there are too few.

    Args:
        count: how many.
        ratio: of prompts that are of another task than the one before, as far as there are prompts left: 1 =
            the tasks take turns, 0 = one task after the other (KNN-SSD's mix ratio, section 5.3).
    """
    left = [task_prompts(task)[:HELD_OUT] for task in TASKS]
    prompts, task, owed = [left[0].pop(0)], 0, 0.0
    while any(left):
        owed += ratio
        if owed >= 1.0 or not left[task]:
            task = next(t % len(left) for t in range(task + 1, task + 1 + len(left)) if left[t % len(left)])
            owed = max(owed - 1.0, 0.0)
        prompts.append(left[task].pop(0))
    return [prompts[i % len(prompts)] for i in range(count)]


def mix_ratio(task: str) -> float | None:
    """The ratio of "mixed" or "mixed/RATIO"; None for another task.

    Raises:
        ValueError: RATIO is not a number from 0 to 1.
    """
    name, slash, text = task.partition("/")
    if name != "mixed":
        return None
    ratio = float(text) if slash else 1.0
    if not 0 <= ratio <= 1:
        raise ValueError(f"{ratio} is not from 0 to 1")
    return ratio


def prompts_of(task: str, count: int) -> list[str]:
    """So many prompts of a task or of a stream of all, from the start again if there are too few."""
    ratio = mix_ratio(task)
    if ratio is not None:
        return mixed_prompts(count, ratio)
    return list(islice(cycle(task_prompts(task)[:HELD_OUT]), count))


def number_of_prompts(prompts: int, concurrency: int, task: str = "mixed") -> int:
    """Enough to keep as many requests running for most of the time.

    Of "mixed/RATIO" always all prompts there are, for any ratio to be of the same ones.
    """
    needed = max(prompts, 2 * concurrency)
    return -(-needed // ALL_PROMPTS) * ALL_PROMPTS if task.startswith("mixed/") else needed


def answer_length(i: int, mean: int, equal: bool) -> int:
    """Tokens of the ``i``-th answer: from half of ``mean`` to one and a half, evenly, unless all are equal.

    With answers of one length a server whose requests all advance alike ends and starts them all at once, and
    reads their prompts in one batch, which no server with real traffic does.
    """
    return mean if equal else max(1, round(mean * (0.5 + i * GOLDEN % 1.0)))


def longest_stream(args: argparse.Namespace, task: str) -> int:
    """Prompts of a task that the largest load asks."""
    at_once = max(level for load in args.concurrency for level in levels(load))
    return number_of_prompts(args.prompts, at_once, task)


def questions_of(args: argparse.Namespace, task: str) -> list[spec_bench.Question]:
    """The questions of Spec-Bench that a task asks.

    Raises:
        ValueError: an option is wrong, or there are too few; the message is for the user.
    """
    if args.spec_bench is None:
        raise ValueError(f"--tasks {task}: needs --spec-bench with the path of question.jsonl")
    questions = spec_bench.select(spec_bench.read_questions(args.spec_bench), task, args.skip)
    needed = longest_stream(args, task)
    if len(questions) < needed:
        raise ValueError(
            f"--tasks {task}: --spec-bench {args.spec_bench} has {len(questions)} prompts after --skip "
            f"{args.skip}, and --prompts or twice the largest --concurrency needs {needed}"
        )
    return questions[:needed]


def datasets(
    args: argparse.Namespace, folder: Path, chat: spec_bench.Chat | None = None
) -> dict[str, list[str]]:
    """Options of `vllm bench serve` for each task, apart from the number of prompts.

    ``chat``: the model as Spec-Bench asks it; None where it does not.
    """
    options = {}
    for task in (WARM_UP, *args.tasks):
        longest = longest_stream(args, task)
        if task == WARM_UP:
            few = [prompt for known in TASKS for prompt in task_prompts(known)[HELD_OUT:]]
            prompts = list(islice(cycle(few), longest))
        elif spec_bench.is_spec_bench(task):
            assert chat is not None
            prompts = spec_bench.prompts(questions_of(args, task), longest, chat)
        else:
            prompts = prompts_of(task, longest)
        path = folder / f"{task.replace('/', '_')}.jsonl"
        # The model ends its answers itself where it is asked as an assistant.
        ends = spec_bench.is_spec_bench(task)
        lengths = (answer_length(i, args.max_tokens, args.equal_lengths or ends) for i in count())
        lines = [
            {"prompt": prompt, "output_tokens": length}
            for prompt, length in zip(prompts, lengths, strict=False)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        options[task] = [
            "--dataset-name=custom",
            f"--dataset-path={path}",
            "--custom-output-len=-1",  # what each line says
            *([] if ends else ["--ignore-eos"]),
        ]
    return options
