"""How many drafts are accepted, whatever they cost: the mixed stream, greedy, without early exit.

.venv/bin/python scripts/bench/acceptance.py MODEL --method NAME=CONFIG ... [--at-once 25] -- server arguments
"""

import argparse
import itertools
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

from clasp_vllm.bench.about import about
from clasp_vllm.bench.engine import stay_in_process
from clasp_vllm.bench.options import engine_settings, number, split_arguments
from clasp_vllm.bench.prompts import mixed_prompts
from clasp_vllm.config import read_settings


def accepted(args: argparse.Namespace, config: str) -> tuple[float, list[float]]:
    """Mean accepted length, and the share accepted at each position of those accepted before it."""
    from vllm import LLM, SamplingParams

    given = {"num_speculative_tokens": args.num_tokens, "draft_exit_threshold": 0.0}
    settings = engine_settings(args.model, args.server_arguments)
    settings |= {"max_num_seqs": args.at_once, "disable_log_stats": False}
    llm = LLM(args.model, speculative_config=read_settings(config) | given, **settings)
    params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens, ignore_eos=True)
    llm.generate(mixed_prompts(args.prompts), params)
    found = {
        m.name.removeprefix("vllm:spec_decode_num_"): m for m in llm.get_metrics() if "spec_decode" in m.name
    }
    drafts = found["drafts"].value
    at = [drafts, *found["accepted_tokens_per_pos"].values]
    shares = [after / before for before, after in itertools.pairwise(at)]
    return 1 + found["accepted_tokens"].value / drafts, shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--method", action="append", required=True, metavar="NAME=CONFIG")
    parser.add_argument("--at-once", type=number(1), default=1, help="requests at once (default 1)")
    parser.add_argument("--prompts", type=number(1), default=25, help="default 25")
    parser.add_argument("--num-tokens", type=number(1), default=6, help="draft tokens of a round (default 6)")
    parser.add_argument("--max-tokens", type=number(1), default=64, help="tokens per answer (default 64)")
    words, server_arguments = split_arguments(sys.argv[1:])
    args = parser.parse_args(words, argparse.Namespace(server_arguments=server_arguments))
    stay_in_process()
    print("\n".join(f"- {name}: {value}" for name, value in about(args.model).items()))
    print("\n| method | mean accepted length | at each position, of those accepted before |\n|---|---|---|")
    for method in args.method:
        name, _, config = method.partition("=")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            length, shares = pool.submit(accepted, args, config).result()
        print(f"| {name} | {length:.2f} | {' '.join(f'{share:.2f}' for share in shares)} |", flush=True)


if __name__ == "__main__":
    main()
