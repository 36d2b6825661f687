"""Would it pay to begin with the masks of a prompt's task, until a request has found its own?

    .venv/bin/python scripts/bench/warm_start.py MODEL --output warm_start.json

The task is told instead of matched, and its masks are what CLaSp itself comes to in the mean over other
prompts of it, for every budget (a calibration's are for one budget, and what the controller chooses from are
many). Without, a new request begins with the mean over all requests. Both in one engine, in turn, on the
mixed stream; what passes find starts afresh each time, the controller's averages do not.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.progress import track
from settings import report, seconds, start

from clasp_vllm.bench.engine import drafter
from clasp_vllm.bench.options import number, numbers
from clasp_vllm.bench.prompts import HELD_OUT, TASKS, mixed_prompts, number_of_prompts, task_prompts

COLD, WARM = "mean over all", "mean of the task"


@contextmanager
def beginning_with(sequences: Any, masks: dict[str, Any], tasks: dict[str, str]) -> Iterator[None]:
    """New requests begin with the masks of their task.

    Args:
        sequences: the drafter's ``SequenceTable``.
        masks: by task.
        tasks: by prompt id.
    """
    slot_of, set_initial = sequences._slot, sequences.set_initial_mask

    def slot(request_id: str) -> int:
        if request_id not in sequences._slots:
            sequences.initial_mask = masks[tasks[request_id.split("/")[0]]]
        return slot_of(request_id)

    sequences._slot, sequences.set_initial_mask = slot, lambda mask: None
    try:
        yield
    finally:
        sequences._slot, sequences.set_initial_mask = slot_of, set_initial


def learn(engine: Any, ours: Any, prompts: Sequence[str], params: Any) -> Any:
    """[budgets, num_layers, 2] masks that CLaSp comes to in the mean over some prompts."""
    ours.sequences.reset()
    ours.policy.reset()
    seconds(engine, prompts, 1, params)
    assert ours.policy.evidence.passes, "nothing was drafted, so there is nothing to begin with"
    return ours.sequences.initial_mask.clone()


def measure(llm: Any, ours: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Both beginnings at all loads."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens, ignore_eos=True)
    others = {task: task_prompts(task)[HELD_OUT:] for task in TASKS}
    masks = {task: learn(llm.llm_engine, ours, prompts, params) for task, prompts in others.items()}
    task_of = {prompt: task for task in TASKS for prompt in task_prompts(task)}
    found = []
    for at_once in args.concurrency:
        prompts = mixed_prompts(number_of_prompts(args.prompts, at_once))
        tasks = {str(i): task_of[prompt] for i, prompt in enumerate(prompts)}
        for repeat in track(range(args.repeats), description=f"{at_once} at once"):
            for name in (COLD, WARM)[:: (-1) ** repeat]:
                learn(llm.llm_engine, ours, [prompt for some in others.values() for prompt in some], params)
                before = ours.statistics.total.rounds
                warm = beginning_with(ours.sequences, masks, tasks) if name == WARM else nullcontext()
                with warm:
                    took = seconds(llm.llm_engine, prompts, at_once, params)
                found.append(
                    {
                        "beginning": name,
                        "concurrency": at_once,
                        "repeat": repeat,
                        "tokens_per_second": len(prompts) * args.max_tokens / took,
                        "rounds": ours.statistics.total.rounds - before,
                    }
                )
    return found


def table(found: list[dict[str, Any]], concurrency: Sequence[int]) -> str:
    """Ratios of the second beginning to the first, in Markdown."""
    lines = [
        "| at once | tokens/s, mean of the task over mean over all | rounds that skip |",
        "|---|---|---|",
    ]
    for at_once in concurrency:
        of = [one for one in found if one["concurrency"] == at_once]
        cold, warm = ([one for one in of if one["beginning"] == name] for name in (COLD, WARM))
        ratios = [b["tokens_per_second"] / a["tokens_per_second"] for a, b in zip(cold, warm, strict=True)]
        rounds = (statistics.mean(one["rounds"] for one in some) for some in (warm, cold))
        lines.append(
            f"| {at_once} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
            f"{' / '.join(f'{mean:.0f}' for mean in rounds)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--concurrency", type=numbers(1), default=[1, 4])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repeats", type=number(1), default=3)
    parser.add_argument("--prompts", type=number(1), default=HELD_OUT * len(TASKS))
    parser.add_argument("--max-tokens", type=number(1), default=32, help="tokens per answer")
    parser.add_argument("--output", type=Path, help="JSON file for all measurements")
    args = parser.parse_args()
    llm = start(args.model, {"method": "clasp", "ngram_cascade": False}, max(args.concurrency))
    found = measure(llm, drafter(llm), args)
    report(found, table(found, args.concurrency), args.output)


if __name__ == "__main__":
    main()
