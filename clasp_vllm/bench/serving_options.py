"""The options of `clasp-vllm bench`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from clasp_vllm.tools.cost_model import costs_by_batch
from clasp_vllm.tools.options import loads, number, numbers
from clasp_vllm.tools.prompts import HELD_OUT, TASKS, mix_ratio, questions_of
from clasp_vllm.tools.spec_bench import GROUPS, is_spec_bench

METHODS: dict[str, dict[str, Any]] = {
    "ngram": {
        "method": "ngram",
        "num_speculative_tokens": 5,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 4,
    },
    "uniform 50 %": {"method": "layer_skip", "skip_ratio": 0.5},
    "clasp": {"method": "clasp"},
    "clasp 33 %": {"method": "clasp", "adaptive": False, "skip_ratio": 0.33},
    "clasp 50 %": {"method": "clasp", "adaptive": False, "skip_ratio": 0.5},
    "clasp 67 %": {"method": "clasp", "adaptive": False, "skip_ratio": 0.67},
    "clasp 50 %, every 128": {
        "method": "clasp",
        "adaptive": False,
        "skip_ratio": 0.5,
        "optimization_interval": 128,
    },
}
QUICK = ("ngram", "clasp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    # Long, but a plain list: an entry for each option.
    parser.add_argument("model", help="name or path")
    parser.add_argument(
        "--method",
        action="append",
        metavar="NAME=CONFIG",
        help="a speculative configuration, JSON or a file, under a name; may be given several times "
        f"(default: {', '.join(METHODS)})".replace("%", "%%"),
    )
    parser.add_argument(
        "--tasks",
        type=lambda text: text.split(","),
        help=f"of {', '.join(TASKS)}, mixed (all in turn), mixed/RATIO (of prompts of another task than the "
        "one before: 0 = one task after the other), spec_bench (chat requests of Spec-Bench's groups in "
        f"turn), spec_bench/GROUP with GROUP of {', '.join(GROUPS)}, or a category of multi_turn (default: "
        "the package's)",
    )
    parser.add_argument(
        "--spec-bench",
        type=Path,
        metavar="FILE",
        help="Spec-Bench's question.jsonl. The first questions of each group are asked as chat requests: of "
        "multi_turn its categories in turn and both turns, the second after plain vLLM's greedy answer to "
        "the first. The model ends the answers",
    )
    parser.add_argument(
        "--skip",
        type=number(0),
        default=0,
        help="leave out the first so many questions of each group of Spec-Bench (default %(default)s)",
    )
    parser.add_argument(
        "--concurrency",
        type=loads,
        help="requests at once (default 1,2,4,8,16); 1-4-16-4-1 is a load that rises and falls",
    )
    parser.add_argument(
        "--temperature", type=lambda text: [float(part) for part in text.split(",")], help="default 0,1"
    )
    parser.add_argument("--repeats", type=number(1), help="alternating repeats (default 3)")
    parser.add_argument(
        "--prompts",
        type=number(1),
        help=f"prompts per task, each turn being one (default {HELD_OUT}); at least twice as many as run at "
        "once",
    )
    parser.add_argument(
        "--max-tokens",
        type=number(1),
        default=64,
        help="tokens per answer, in the mean; of Spec-Bench's at most (default %(default)s)",
    )
    parser.add_argument(
        "--equal-lengths",
        action="store_true",
        help="all answers of the same length; else they lie between half and one and a half of it",
    )
    parser.add_argument(
        "--profile", type=numbers(1), default=[], help="also say where the time goes, at these batch sizes"
    )
    parser.add_argument("--costs", type=Path, help="figures of `clasp-vllm costs`, to predict ratios from")
    parser.add_argument("--quick", action="store_true", help="a smoke run: two methods, few prompts, once")
    parser.add_argument("--output", type=Path, default=Path("bench"), help="folder (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8300, help="port to try first")
    parser.epilog = "All arguments after -- go to every server."


def fill_in(args: argparse.Namespace) -> dict[str, str]:
    """Put the defaults in place; the methods as {name: configuration}.

    Raises:
        ValueError: an option is wrong; the message names it.
    """
    quick = args.quick
    args.tasks = args.tasks or (["mixed"] if quick else [*TASKS, "mixed"])
    args.concurrency = args.concurrency or ([1] if quick else [1, 2, 4, 8, 16])
    args.temperature = args.temperature or ([0.0] if quick else [0.0, 1.0])
    args.repeats = args.repeats or (1 if quick else 3)
    args.prompts = args.prompts or HELD_OUT
    for task in args.tasks:
        if is_spec_bench(task):
            questions_of(args, task)
        elif task in TASKS and args.prompts > HELD_OUT:
            raise ValueError(f"--prompts {args.prompts}: --tasks {task} has {HELD_OUT}")
        elif task not in TASKS and not _is_mixed(task):
            raise ValueError(
                f"--tasks {task}: allowed are {', '.join(TASKS)}, mixed, mixed/RATIO with RATIO from 0 to 1, "
                "spec_bench and spec_bench/GROUP"
            )
    if args.costs is not None:
        args.costs = read_costs(args.costs, args.model)
    if args.method is None:
        return {name: json.dumps(METHODS[name]) for name in (QUICK if quick else METHODS)}
    methods = dict(text.partition("=")[::2] for text in args.method)
    for name, config in methods.items():
        if not config:
            raise ValueError(f"--method {name}: allowed is NAME=CONFIG, CONFIG being JSON or a file")
    return methods


def _is_mixed(task: str) -> bool:
    try:
        return mix_ratio(task) is not None
    except ValueError:
        return False


def read_costs(path: Path, model: str) -> dict[str, Any]:
    """What `clasp-vllm costs --json` wrote of this model.

    Raises:
        ValueError: it is something else, or of another model.
    """
    try:
        costs: dict[str, Any] = json.loads(path.read_text())
        costs_by_batch(costs)
        of = costs["about"]["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--costs {path}: not written by clasp-vllm costs --json ({error!r})") from None
    if of != model:
        raise ValueError(f"--costs {path}: these are the costs of {of}, not of {model}")
    return costs
