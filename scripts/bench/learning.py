"""How fast does the controller come to know requests that it has not met? One request at a time.

    .venv/bin/python scripts/bench/learning.py MODEL --temperature 1 --output learning.json

It forgets all about acceptance and masks, and answers some prompts, each beside the same engine without
speculation; then once more in another order, and so on. Per answer: the ratio, what the rounds did, what the
controller promised, and what it thinks of drafts and of n-grams afterwards (offsets in logits, see
``drafting/acceptance.py``). What passes cost it keeps, for that is the machine's and not the requests'.
"""

import argparse
import random
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import track
from settings import ALL, OFF, changed, report, seconds, start

from clasp_vllm.bench.engine import drafter
from clasp_vllm.bench.options import number
from clasp_vllm.bench.prompts import HELD_OUT, TASKS, task_prompts

SKIPPING, NGRAMS, NEITHER = KINDS = "skipping", "n-grams", "neither"
COLUMNS = "answer", "ratio", "promised", *KINDS, "tokens a round", "expected", "drafts", "n-grams thought of"


@contextmanager
def recorded(controller: Any) -> Iterator[list[tuple[str, float, float, Any]]]:
    """Of every round what it is to do, the ratio and the tokens to expect, and all that was chosen."""
    choose, rounds = controller.choose, []

    def recording(*args: Any) -> Any:
        choice = choose(*args)
        did = SKIPPING if choice.length else NEITHER
        if choice.ngram and not choice.checked:
            did = NGRAMS
        rounds.append((did, choice.ratio, 1.0 if did == NEITHER else choice.tokens, choice))
        return choice

    controller.choose = recording
    try:
        yield rounds
    finally:
        controller.choose = choose


def summary(rounds: list[tuple[str, float, float, Any]], skipped: Sequence[float]) -> dict[str, Any]:
    """What the rounds of an answer were. ``skipped``: layers, by budget."""
    did, promised, expected, choices = zip(*rounds, strict=True)
    drafted = [choice for what, choice in zip(did, choices, strict=True) if what == SKIPPING]
    return {
        "rounds": {kind: did.count(kind) for kind in KINDS},
        "promised": round(statistics.mean(promised), 3),
        "expected": round(statistics.mean(expected), 3),
        "length": round(statistics.mean(choice.length for choice in drafted), 2) if drafted else None,
        "skipped": round(statistics.mean(skipped[choice.budget] for choice in drafted), 2)
        if drafted
        else None,
        "floor": round(statistics.mean(float(choice.floor) for choice in drafted), 3) if drafted else None,
    }


def prompts_in_order(order: int, prompts: int) -> list[tuple[str, str]]:
    """Tasks and prompts, the tasks in turn, shuffled by the order's number."""
    shuffle = random.Random(order)
    of = {task: shuffle.sample(task_prompts(task)[:HELD_OUT], HELD_OUT) for task in TASKS}
    found = []
    for i in range(HELD_OUT):
        found += [(task, of[task][i]) for task in shuffle.sample(TASKS, len(TASKS))]
    return found[:prompts]


def measure(llm: Any, ours: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All settings in all orders."""
    from vllm import SamplingParams

    engine, controller = llm.llm_engine, ours.adaptive
    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens, ignore_eos=True)
    greedy = SamplingParams(temperature=0, max_tokens=args.max_tokens, ignore_eos=True)
    for setting in (ALL, OFF):
        with changed(controller, setting):
            seconds(engine, [prompt for task in TASKS for prompt in task_prompts(task)[-1:]], 1, greedy)
    found = []
    for order in track(range(args.orders)):
        for setting in (ALL, *args.beside):
            ours.forget()
            for i, (task, prompt) in enumerate(prompts_in_order(order, args.prompts)):
                with changed(controller, setting), recorded(controller) as rounds:
                    took = seconds(engine, [prompt], 1, params)
                with changed(controller, OFF):
                    off = seconds(engine, [prompt], 1, params)
                kind = int(args.temperature > 0)
                found.append(
                    {
                        "setting": setting,
                        "order": order,
                        "answer": i + 1,
                        "task": task,
                        "tokens_per_second": args.max_tokens / took,
                        "off": args.max_tokens / off,
                        "drafts": round(float(controller.evidence.drafts.mean[kind]), 3),
                        "ngrams": round(float(controller.evidence.ngrams.mean[kind]), 3),
                        "accepted by confidence": controller.confidence.accepted[kind].round(3).tolist(),
                        **(summary(rounds, controller._skipped) if setting == ALL else {}),
                    }
                )
    return found


def speed(answers: list[dict[str, Any]]) -> float:
    """Of all these answers together, over that without speculation."""
    off, on = (sum(1 / one[name] for one in answers) for name in ("off", "tokens_per_second"))
    return off / on


def table(found: list[dict[str, Any]], tokens: int) -> str:
    """Over all orders, by answer, and of the first ten and the others for all settings; in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    ours = [one for one in found if one["setting"] == ALL]
    for i in sorted({one["answer"] for one in ours}):
        of = [one for one in ours if one["answer"] == i]
        rounds = sum(sum(one["rounds"].values()) for one in of)
        cells = [str(i), f"{speed(of):.2f}", f"{statistics.mean(one['promised'] for one in of):.2f}"]
        cells += [f"{sum(one['rounds'][kind] for one in of) / rounds:.0%}" for kind in KINDS]
        cells.append(f"{len(of) * (tokens - 1) / (rounds - len(of)):.2f}")  # the last is for nothing
        cells += [
            f"{statistics.mean(one[name] for one in of):.2f}" for name in ("expected", "drafts", "ngrams")
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| setting | first ten answers | by order | others |", "|---|---|---|---|"]
    for setting in dict.fromkeys(one["setting"] for one in found):
        of = [one for one in found if one["setting"] == setting]
        first, others = ([one for one in of if (one["answer"] <= 10) == early] for early in (True, False))
        orders = [[one for one in first if one["order"] == order] for order in {one["order"] for one in of}]
        ratios = sorted(speed(one) for one in orders)
        later = f"{speed(others):.2f}" if others else ""
        lines.append(f"| {setting} | {speed(first):.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} | {later} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--orders", type=number(1), default=4, help="of the prompts, each begun afresh")
    parser.add_argument("--prompts", type=number(1), default=15, help="of each order, of 25 at most")
    parser.add_argument("--max-tokens", type=number(1), default=32, help="tokens per answer")
    parser.add_argument(
        "--beside",
        type=lambda text: [name for name in text.split(",") if name],
        default=["fixed 16x3"],
        help="other settings of settings.py, commas between them (default 'fixed 16x3')",
    )
    parser.add_argument("--output", type=Path, help="JSON file for all answers")
    args = parser.parse_args()
    llm = start(args.model, {"method": "clasp"}, 1)
    found = measure(llm, drafter(llm), args)
    report(found, table(found, args.max_tokens), args.output)


if __name__ == "__main__":
    main()
