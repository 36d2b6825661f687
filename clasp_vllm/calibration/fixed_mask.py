"""The command that looks for the best fixed set of layers to skip."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from clasp_vllm.calibration.search import SEARCHES, Trials
from clasp_vllm.skipping.skip_mask import evenly_spaced_layers
from clasp_vllm.tools.options import number
from clasp_vllm.tools.prompts import HELD_OUT, TASKS, read_prompts, task_prompts
from clasp_vllm.tools.provenance import about


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("model", help="name or path of a model of the Llama family")
    parser.add_argument("--num-skipped-layers", type=number(1), required=True, help="how many layers to skip")
    parser.add_argument("--trials", type=number(1), default=400, help="sets to try (default %(default)s)")
    parser.add_argument(
        "--search", choices=SEARCHES, default="swaps", help="how to search (default %(default)s)"
    )
    parser.add_argument(
        "--prompts", type=Path, help='file of lines {"prompt": "..."} (default: the package\'s)'
    )
    parser.add_argument("--max-tokens", type=number(2), default=64, help="tokens of each answer to score")
    parser.add_argument("--seed", type=int, default=0, help="of the search (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the trials to this file")


def main(args: argparse.Namespace) -> int:
    """Run the command: prints a configuration of method layer_skip."""
    from rich.progress import Progress

    from clasp_vllm.calibration.acceptance import Acceptance  # imports torch and transformers

    prompts = [prompt for task in TASKS for prompt in task_prompts(task)[HELD_OUT:]]
    try:
        if args.prompts:
            prompts = read_prompts(args.prompts, f"--prompts {args.prompts}")
    except ValueError as error:
        print(f"clasp-vllm: error: {error}")
        return 2
    acceptance = Acceptance(args.model, prompts, args.max_tokens)
    if args.num_skipped_layers >= acceptance.num_layers:
        print(
            f"clasp-vllm: error: --num-skipped-layers {args.num_skipped_layers}: "
            f"allowed are 1 to {acceptance.num_layers - 1}"
        )
        return 2
    started = time.monotonic()
    with Progress() as progress:
        bar = progress.add_task(args.search, total=args.trials)
        trials = Trials(acceptance, args.trials, lambda: progress.advance(bar))
        start = frozenset(evenly_spaced_layers(acceptance.num_layers, args.num_skipped_layers))
        best = SEARCHES[args.search](trials, acceptance.num_layers, start, args.seed, False)
    result: dict[str, Any] = {
        "about": about(args.model),
        "search": args.search,
        "seconds": time.monotonic() - started,
        "evenly_spaced": trials.scores[start],
        "best": trials.scores[best],
        "config": {"method": "layer_skip", "skip_layers": sorted(best)},
    }
    if args.json:
        scores = [{"skip_layers": sorted(s), "score": score} for s, score in trials.scores.items()]
        args.json.write_text(json.dumps(result | {"trials": scores}) + "\n")
    print(
        f"# first-token acceptance {result['best']:.3f} (evenly spaced {result['evenly_spaced']:.3f}), "
        f"{len(trials.scores)} trials in {result['seconds']:.0f} s"
    )
    print(json.dumps(result["config"]))
    return 0
