"""The same server in several environments, asked in turn: preloaded libraries, or commits of the package.

    .venv/bin/python scripts/bench/environments.py MODEL --env none: --env omp:LD_PRELOAD=LIBRARY -- ...

For commits, make a worktree of each and name it: --env "before:PYTHONPATH=../before". What follows -- are
arguments of vllm serve. Ratios are to the first environment, of neighbouring measurements.
"""

import argparse
import itertools
import os
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path

from clasp_vllm.bench.serving import Workload, measure
from clasp_vllm.tools.options import number, numbers, split_arguments
from clasp_vllm.tools.prompts import datasets
from clasp_vllm.tools.provenance import about
from clasp_vllm.tools.servers import serve


def environment(text: str) -> tuple[str, dict[str, str]]:
    name, colon, variables = text.partition(":")
    pairs = [variable.partition("=") for variable in variables.split()]
    if not colon or not all(equals for _, equals, _ in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed is NAME:[VARIABLE=VALUE ...]")
    return name, {key: value for key, _, value in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument(
        "--env", action="append", required=True, type=environment, help="NAME:VARIABLE=VALUE ..."
    )
    parser.add_argument("--concurrency", type=numbers(1), default=[1])
    parser.add_argument("--repeats", type=number(1), default=3)
    parser.add_argument("--prompts", type=number(1), default=5, help="at least; of the mixed stream")
    parser.add_argument("--max-tokens", type=number(1), default=48, help="tokens per answer")
    parser.add_argument("--output", type=Path, default=Path("bench"), help="folder for the logs")
    own_arguments, server_arguments = split_arguments(sys.argv[1:])
    args = parser.parse_args(own_arguments, argparse.Namespace(tasks=["mixed"], equal_lengths=True))
    args.output.mkdir(parents=True, exist_ok=True)
    sets = datasets(args, args.output)
    names = [name for name, _ in args.env]
    speeds: dict[tuple[str, int], list[float]] = {
        key: [] for key in itertools.product(names, args.concurrency)
    }
    with ExitStack() as stack:
        servers = {}
        for name, variables in args.env:
            before = {key: os.environ.get(key) for key in variables}
            os.environ.update(variables)
            servers[name] = stack.enter_context(
                serve(args.model, *server_arguments, log=args.output / f"{name}.log", port=8400)
            )
            for key, value in before.items():
                os.environ.pop(key)
                if value is not None:
                    os.environ[key] = value
        for repeat, concurrency in itertools.product(range(args.repeats + 1), args.concurrency):
            for name in names if repeat % 2 else reversed(names):
                workload = Workload("mixed", concurrency, 0.0)
                result = measure(servers[name], workload, sets["mixed"], args.prompts)
                if repeat:  # the first warms up
                    speeds[name, concurrency].append(result["total_output_tokens"] / result["duration"])
    print("\n".join(f"- {name}: {value}" for name, value in about(args.model).items()))
    print("\n| environment | at once | tokens/s | ratio to the first |\n|---|---|---|---|")
    for (name, concurrency), values in speeds.items():
        first = speeds[names[0], concurrency]
        ratios = [value / other for value, other in zip(values, first, strict=True)]
        print(
            f"| {name} | {concurrency} | {statistics.median(values):.1f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) |"
        )


if __name__ == "__main__":
    main()
