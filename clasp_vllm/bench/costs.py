"""What the parts of a round cost: measured in a running engine, in turn, over and over.

The engine decodes as ever, but its drafts are made up: this many tokens, then that many, so that steps
of every kind follow one another. In between, the drafter's parts run on the real batch with the
real cache, and their results are thrown away.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from clasp_vllm.config import ConfigError, parse_config
from clasp_vllm.tools.cost_model import Costs, break_even
from clasp_vllm.tools.engine import model_runner, stay_in_process
from clasp_vllm.tools.options import engine_settings, number, numbers
from clasp_vllm.tools.prompts import mixed_prompts
from clasp_vllm.tools.provenance import about

LENGTHS = (0, 1, 2, 4, 8)  # of made-up drafts
MASKS_AT_ONCE = 4  # as by default


class Timings:
    """Seconds of repeated measurements, by name."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.seconds: dict[Any, list[float]] = defaultdict(list)
        self._synchronize = synchronize

    def time(self, name: Any, call: Callable[[], Any]) -> float:
        """Run ``call``; book and return its seconds."""
        self._synchronize()
        started = time.perf_counter()
        call()
        self._synchronize()
        seconds = time.perf_counter() - started
        self.seconds[name].append(seconds)
        return seconds

    def median(self, name: Any) -> float:
        """Of the measurements under this name; the first two warm up."""
        return statistics.median(self.seconds[name][2:])


def measure(llm: Any, batch: int, repeats: int) -> tuple[Costs, Timings]:
    """The costs for ``batch`` sequences. ``llm`` is an engine with our method, in this process."""
    import numpy as np
    import torch
    from vllm import SamplingParams

    from clasp_vllm.drafting.draft import DraftOutput
    from clasp_vllm.drafting.policy import Policy
    from clasp_vllm.skipping.skip_mask import evenly_spaced_layers, layers_mask

    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    timings = Timings(synchronize)
    engine = llm.llm_engine
    runner = model_runner(llm)
    proposer = runner.drafter
    drafter = proposer.drafter
    num_layers = drafter.decoder.num_layers
    longest = proposer.speculative_config.num_speculative_tokens
    kept = sorted({num_layers, num_layers // 2, num_layers // 4})
    lengths = [k for k in LENGTHS if k <= longest]
    in_drafter, in_proposer, verified, steps = 0.0, 0.0, -1, 0
    real_draft, real_propose = drafter.draft, proposer.propose

    def parts(drafts: Any, sample: Any) -> None:
        def draft(tokens: int) -> Callable[[], Any]:
            return lambda: real_draft(drafts, tokens, sample)

        options, policy = drafter.options, drafter.policy
        # So low a threshold costs what any does and stops nobody.
        drafter.options = replace(options, draft_exit_threshold=1e-30)
        drafter.policy = Policy()
        for layers in kept:
            mask = layers_mask(num_layers, evenly_spaced_layers(num_layers, num_layers - layers))
            drafter.sequences.slots(drafts.request_ids)
            drafter.sequences.set_masks(drafts.request_ids, mask.repeat(len(drafts), 1, 1, 1))
            draft(1)()  # what follows from the mask is worked out once
            timings.time(("draft", layers, 1), draft(1))
            timings.time(("draft", layers, longest), draft(longest))
        drafter.options, drafter.policy = options, policy
        hidden = drafter.decoder.finish(drafter.decoder.embed(drafts.tokens))
        everyone = np.arange(len(drafts))
        timings.time("head", lambda: sample(hidden, drafts.positions, 0, everyone))
        due = drafts.select(np.arange(min(batch, MASKS_AT_ONCE)))
        slots = drafter.sequences.slots(due.request_ids)
        seconds = timings.time(
            "optimization pass",
            lambda: sample(policy.optimize(due, slots), due.positions, 0, everyone[: len(due)]),
        )
        timings.seconds["optimize"].append(seconds / len(due))
        policy.apply()
        if drafter.statistics.total.failures:
            raise RuntimeError("drafting failed; the log says why")

    def made_up(drafts: Any, num_tokens: int, sample: Any) -> Any:
        nonlocal in_drafter, verified
        synchronize()
        started = time.perf_counter()
        verified = -1
        if len(drafts) == batch:
            turn = steps % (len(lengths) + 1)
            if turn:
                verified = lengths[turn - 1]
            else:
                parts(drafts, sample)
        tokens = torch.zeros(len(drafts), num_tokens, dtype=torch.int64, device=drafts.tokens.device)
        worth = torch.full_like(drafts.positions, max(verified, 0))
        in_drafter += time.perf_counter() - started
        return DraftOutput(tokens, worth, np.full(tokens.shape, -1))

    def propose(*args: Any, **kwargs: Any) -> Any:
        nonlocal in_proposer
        synchronize()
        started, before = time.perf_counter(), in_drafter
        drafts = real_propose(*args, **kwargs)
        seconds = time.perf_counter() - started
        timings.seconds["proposer"].append(seconds - (in_drafter - before))
        in_proposer += seconds
        return drafts

    drafter.draft, proposer.propose = made_up, propose
    params = SamplingParams(temperature=0.0, max_tokens=repeats * (len(lengths) + 1) + 8, ignore_eos=True)
    try:
        for number, prompt in enumerate(mixed_prompts(batch)):
            engine.add_request(f"costs-{batch}-{number}", prompt, params)
        while engine.has_unfinished_requests():
            kind, before = verified, in_proposer
            started = time.perf_counter()
            engine.step()
            timings.seconds["step", kind].append(time.perf_counter() - started - (in_proposer - before))
            steps += 1
    finally:
        drafter.draft, proposer.propose = real_draft, real_propose

    step = {layers: _line(timings, layers, longest) for layers in kept}
    layer = (step[kept[-1]][0] - step[kept[0]][0]) / (kept[-1] - kept[0])
    head = timings.median("head")
    costs = Costs(
        batch,
        {k: timings.median(("step", k)) for k in lengths},
        layer,
        step[kept[-1]][0] - kept[-1] * layer - head,
        head,
        statistics.median(step[layers][1] for layers in kept) + timings.median("proposer"),
        timings.median("optimize"),
    )
    return costs, timings


def _line(timings: Timings, layers: int, longest: int) -> tuple[float, float]:
    """Seconds of a draft step with ``layers`` layers and of a round of drafting with none."""
    one, many = timings.median(("draft", layers, 1)), timings.median(("draft", layers, longest))
    step = (many - one) / (longest - 1)
    return step, one - step


def read_bandwidth(num_bytes: int, repeats: int = 5) -> float:
    """Bytes per second of reading memory in a stream: the sum of a large tensor on the engine's device."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = torch.ones(-(-num_bytes // 4096), 1024, dtype=torch.int32, device=device)
    timings = Timings(torch.cuda.synchronize if torch.cuda.is_available() else lambda: None)
    for _ in range(repeats + 2):
        timings.time("read", lambda: data.sum(dim=1, dtype=torch.int32))
    return data.nbytes / timings.median("read")


def bytes_per_token(model_config: Any) -> int:
    """Weights that a decode step reads: all but the embedding's other rows. Of dense, unquantised models."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # vLLM's own may be packed into another form
        model = AutoModelForCausalLM.from_config(model_config.hf_text_config, dtype=model_config.dtype)
    embedding = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.nbytes
    return sum(weight.nbytes for weight in model.parameters()) - embedding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""

    parser.add_argument("model", help="name or path")
    parser.add_argument("--batch", type=numbers(1), default=[1, 8], help="sequences at once (default 1,8)")
    parser.add_argument("--skip-ratio", type=float, default=0.5, help="of the optimisation pass")
    parser.add_argument("--longest", type=number(2), default=8, help="draft tokens of a round at most")
    parser.add_argument(
        "--repeats", type=number(3), default=12, help="of each measurement (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.epilog = "Arguments after -- are those of vllm serve."


def main(args: argparse.Namespace) -> int:
    """Run the command: prints Markdown."""
    config = {
        "method": "clasp",
        "adaptive": False,
        "num_speculative_tokens": args.longest,
        "skip_ratio": args.skip_ratio,
    }
    try:
        parse_config(config)
    except ConfigError as error:
        print(f"clasp-vllm: error: {error}", file=sys.stderr)
        return 2
    stay_in_process()
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # V2 verifies all drafts, whatever their length
    from rich.progress import Progress
    from vllm import LLM

    settings = engine_settings(args.model, args.server_arguments)
    settings |= {"async_scheduling": False, "disable_log_stats": False}  # so that steps can be told apart
    settings["max_num_seqs"] = max(args.batch)
    llm = LLM(args.model, speculative_config=config, **settings)
    num_layers = llm.model_config.get_total_num_hidden_layers()
    weights, all_costs, samples = bytes_per_token(llm.model_config), [], []
    with Progress() as progress:
        for batch in progress.track(args.batch, description="sizes of the batch"):
            costs, timings = measure(llm, batch, args.repeats)
            all_costs.append(costs)
            samples.append({str(name): seconds for name, seconds in timings.seconds.items()})
    bandwidth = read_bandwidth(min(weights, 1 << 30))
    facts = {"model": args.model, **about(args.model)}
    print("\n".join(f"- {name}: {value}" for name, value in facts.items()))
    print(
        f"- memory: {weights / 1e9:.2f} GB of weights a step, read at "
        f"{weights / all_costs[0].step[0] / 1e9:.1f} GB/s by a plain step of {all_costs[0].batch}; "
        f"a streaming read right after: {bandwidth / 1e9:.1f} GB/s\n"
    )
    print(cost_table(all_costs), break_even_table(all_costs, num_layers, args.longest), sep="\n\n")
    if args.json:
        results = {
            "about": facts,
            "num_layers": num_layers,
            "bytes_per_token": weights,
            "read_bandwidth": bandwidth,
            "costs": [asdict(costs) for costs in all_costs],
            "samples": samples,
        }
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def cost_table(all_costs: list[Costs]) -> str:
    """Milliseconds of the parts, a row for each size of the batch."""
    lengths = sorted(all_costs[0].step)
    head = ["at once", "plain step", *(f"verify {k}" for k in lengths if k), "a draft layer"]
    head += ["fixed part of a draft step", "head", "fixed part of a round", "a mask"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for c in all_costs:
        seconds = [*(c.step[k] for k in lengths), c.layer, c.draft, c.head, c.drafting, c.optimize]
        cells = [str(c.batch), *("" if s is None else f"{1000 * s:.2f}" for s in seconds)]
        lines.append(f"| {' | '.join(cells)} |")
    return "Milliseconds:\n\n" + "\n".join(lines)


def break_even_table(all_costs: list[Costs], num_layers: int, longest: int) -> str:
    """The acceptance that fixed masks need in order to pay, by share of layers skipped."""
    ratios = (0.0, 0.25, 0.33, 0.5, 0.67, 0.75)
    lines = [f"| at once | {' | '.join(f'{r:.0%}' for r in ratios)} |", "|" + "---|" * (len(ratios) + 1)]
    for costs in all_costs:
        needed = [break_even(costs, num_layers - round(r * num_layers), longest) for r in ratios]
        cells = [str(costs.batch), *("never" if n is None else f"{n:.2f}" for n in needed)]
        lines.append(f"| {' | '.join(cells)} |")
    return "Acceptance of a draft token to break even, at the best draft length, by layers skipped:\n\n" + (
        "\n".join(lines)
    )
