"""What vLLM's recommended libraries change on a CPU: plain vLLM with and without them, asked in turn.

.venv/bin/python scripts/bench/preloads.py MODEL --preload LIBRARY[:LIBRARY] ... -- server arguments
"""

import argparse
import os
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path

from clasp_vllm.bench.about import about
from clasp_vllm.bench.servers import serve, split_arguments
from clasp_vllm.bench.serving import Workload, datasets, measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--preload", action="append", required=True, help="as for LD_PRELOAD; repeatable")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=48, help="tokens per answer")
    parser.add_argument("--output", type=Path, default=Path("bench"), help="folder for the logs")
    words, server_arguments = split_arguments(sys.argv[1:])
    args = parser.parse_args(words, argparse.Namespace(tasks=["mixed"], concurrency=[1], prompts=5))
    args.output.mkdir(parents=True, exist_ok=True)
    sets = datasets(args, args.output)
    speeds: dict[str, list[float]] = {preload: [] for preload in ("", *args.preload)}
    with ExitStack() as stack:
        servers = {}
        for number, preload in enumerate(speeds):
            os.environ["LD_PRELOAD"] = preload
            log = args.output / f"preload-{number}.log"
            servers[preload] = stack.enter_context(serve(args.model, *server_arguments, log=log))
        os.environ["LD_PRELOAD"] = ""
        for repeat in range(args.repeats + 1):  # the first warms up
            for preload, server in servers.items():
                result = measure(server, Workload("mixed", 1, 0.0), sets["mixed"], args.prompts)
                if repeat:
                    speeds[preload].append(result["total_output_tokens"] / result["duration"])
    print("\n".join(f"- {name}: {value}" for name, value in about().items()))
    print("\n| LD_PRELOAD | tokens/s | ratio to none |\n|---|---|---|")
    for preload, values in speeds.items():
        ratios = [value / none for value, none in zip(values, speeds[""], strict=True)]
        names = ", ".join(Path(library).name for library in preload.split(":")) if preload else "none"
        print(
            f"| {names} | {statistics.median(values):.1f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) |"
        )


if __name__ == "__main__":
    main()
