#!/usr/bin/env python3
"""Is clasp_vllm lossless on this GPU, does it draft there, and what do the parts of a round cost?

    python scripts/gpu_check.py [--out DIR] [--seconds 420] [--only equality,segments,profile,speed,kernels]

equality  the demo model in float32 (Triton attention) and bfloat16: greedy tokens beside plain vLLM's (in
          float32 they must be identical), failures of the drafter (must be 0), drafts (must be more than 0).
speed     random weights in the shape of Llama-3-8B, bfloat16, vLLM's default compilation and CUDA graphs:
          decoded tokens per second of plain vLLM and of fixed drafts, in turn. Random weights accept
          nothing, so acceptance is vLLM's synthetic one; the costs are real.
segments  of that model: draft steps by eager calls and by CUDA graphs, the head, the engine's own steps.
profile   one request's rounds under torch.profiler: kernels, launches and waits.
kernels   products in that shape, by rows: bfloat16 and the quantised ones that drafts run.

Engines are each in a process of its own and are measured one at a time: first those of the demo model, then
those of the shape, first segments. Every result is written as soon as it is there, so that a run cut short
keeps what it found.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# A script finds its own folder, from wherever it is started, and so do the processes of its engines.
from gpu.engines import (
    BATCHES,
    DEFAULT_ENGINES,
    QUESTION,
    START,
    patience,
    prompts,
    start_equality,
    start_shape,
)
from gpu.equality import check_equality
from gpu.kernels import SHAPES, kernels
from gpu.profile import profile
from gpu.report import Report
from gpu.segments import segments
from gpu.speed import check_speed

from clasp_vllm.tools.processes import Engine

PARTS = ("equality", "segments", "profile", "speed", "kernels")


def main() -> int:
    """Run the checks; 1 if something failed."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # greedy alone is asked for
    until = time.monotonic() + args.seconds
    import torch
    import vllm

    cuda = torch.cuda.is_available()
    about = {
        "card": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "date": time.strftime("%F"),
    }
    report = Report(args.out, about)
    report.say(f"{about['card']}, torch {torch.__version__}, vLLM {vllm.__version__}")
    equality = start_equality(args, cuda) if "equality" in args.only else {}
    check_equality(equality, report, until)
    shape = start_shape(args, cuda) if {"speed", "segments", "kernels", "profile"} & set(args.only) else {}
    started_by = patience(until, START)
    for name, engine in shape.items():
        started = report.keep("start", name, engine.answer(started_by))
        report.say(f"{name}: started in {started.get('start_seconds', 0):.0f} s {started}")
    drafting = shape.get("skip16_k4")
    if drafting is not None:
        look_inside(drafting, args, cuda, report, until)
    if "speed" in args.only:
        check_speed(shape, args.repeats, report, until)
    for engine in shape.values():
        if engine is not drafting:
            engine.stop()
    if drafting is not None:
        if "kernels" in args.only and cuda:
            for name in SHAPES:
                result = report.keep(
                    "kernels", name, drafting.ask(kernels, patience(until, QUESTION), name=name)
                )
                report.say(f"kernels {name}: {json.dumps(result, indent=1)}")
        drafting.stop()
    report.say("done" if not report.failed else f"FAILED: {', '.join(report.failed)}")
    return int(bool(report.failed))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder for results and logs")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS)
    )
    parser.add_argument("--seconds", type=float, default=420, help="for everything")
    parser.add_argument(
        "--small", action="store_true", help="a small shape in place of Llama-3-8B's, to try this"
    )
    parser.add_argument(
        "--engines",
        type=lambda text: text.split(","),
        default=list(DEFAULT_ENGINES),
        help=f"of the shape; default {','.join(DEFAULT_ENGINES)}, beside which skip0_k3, skip8_k3 and "
        "default_a50 do not fit on one card",
    )
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def look_inside(engine: Engine, args: argparse.Namespace, cuda: bool, report: Report, until: float) -> None:
    """The parts that run in the process of an engine: segments and, on a GPU, a profile."""

    def ask(part: str, name: str, command: Any, **arguments: Any) -> None:
        result = report.keep(part, name, engine.ask(command, patience(until, QUESTION), **arguments))
        if cuda and part == "segments" and not result.get("graphs"):
            report.keep(part, name, {**result, "error": "drafts run without CUDA graphs"})
        report.say(f"{part} {name}: {json.dumps(result, indent=1)}")

    if "segments" in args.only:
        for rows in BATCHES:
            ask("segments", str(rows), segments, rows=rows)
    if "profile" in args.only and cuda:
        ask("profile", "1", profile, prompts=prompts(1), tokens=48, folder=str(args.out))


if __name__ == "__main__":
    sys.exit(main())
