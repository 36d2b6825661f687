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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clasp_vllm.bench.profile import Stopwatch
from clasp_vllm.config import ConfigError, parse_config
from clasp_vllm.control.planner import Choice
from clasp_vllm.drafting.batch import SequenceBatch
from clasp_vllm.drafting.draft import DraftOutput, Sample
from clasp_vllm.drafting.drafter import Drafter
from clasp_vllm.drafting.observer import RoundObserver
from clasp_vllm.drafting.policy import Policy
from clasp_vllm.skipping.skip_mask import evenly_spaced_layers, layers_mask
from clasp_vllm.tools.cost_model import Costs, break_even
from clasp_vllm.tools.engine import drafter as drafter_of
from clasp_vllm.tools.engine import proposer as proposer_of
from clasp_vllm.tools.engine import stay_in_process
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


class MadeUpDrafts(RoundObserver):
    """Has steps verify made-up drafts of every length in turn, and times the drafter's parts once a turn.

    Attributes:
        length: tokens of the last round's drafts; -1: that was no round to time.
        step: engine steps so far, which say whose turn it is.
    """

    def __init__(
        self, drafter: Drafter, batch: int, longest: int, timings: Timings, stopwatch: Stopwatch
    ) -> None:
        """
        Args:
            batch: sequences of the rounds to time.
            longest: draft tokens of a round at most.
            stopwatch: books what happens here under "drafter".
        """
        self.length, self.step = -1, 0
        self.lengths = [k for k in LENGTHS if k <= longest]
        self._drafter, self._batch, self._longest = drafter, batch, longest
        self._timings, self._stopwatch = timings, stopwatch

    def round_started(self, batch: SequenceBatch, num_tokens: int, sample: Sample) -> DraftOutput:
        """See ``RoundObserver``."""
        with self._stopwatch.part("drafter"):
            self.length = -1
            if len(batch) == self._batch:
                turn = self.step % (len(self.lengths) + 1)
                if turn:
                    self.length = self.lengths[turn - 1]
                else:
                    self._time_parts(batch, sample)
            tokens = torch.zeros(len(batch), num_tokens, dtype=torch.int64, device=batch.tokens.device)
            worth = torch.full_like(batch.positions, max(self.length, 0))
            return DraftOutput(tokens, worth, np.full(tokens.shape, -1))

    def _time_parts(self, batch: SequenceBatch, sample: Sample) -> None:
        drafter, everyone = self._drafter, np.arange(len(batch))
        options, policy = drafter.options, drafter.policy
        # So low a threshold costs what any does and stops nobody.
        drafter.options, drafter.policy = replace(options, draft_exit_threshold=1e-30), Policy()
        drafter.observer = None  # the drafter itself is to draft
        try:
            self._time_drafts(batch, sample)
        finally:
            drafter.options, drafter.policy, drafter.observer = options, policy, self
        hidden = drafter.decoder.finish(drafter.decoder.embed(batch.tokens))
        self._timings.time("head", lambda: sample(hidden, batch.positions, 0, everyone))
        due = batch.select(everyone[:MASKS_AT_ONCE])
        slots = drafter.sequences.slots(due.request_ids)
        whole = Choice(len(options.budgets) - 1, 1)
        seconds = self._timings.time(
            "optimization pass",
            lambda: sample(policy.optimize(due, slots, whole), due.positions, 0, everyone[: len(due)]),
        )
        self._timings.seconds["optimize"].append(seconds / len(due))
        policy.apply()
        if drafter.statistics.total.failures:
            raise RuntimeError("drafting failed; the log says why")

    def _time_drafts(self, batch: SequenceBatch, sample: Sample) -> None:
        """Rounds of one token and of as many as there may be, with ever fewer layers."""
        drafter, num_layers = self._drafter, self._drafter.decoder.num_layers
        for layers in layers_kept(num_layers):
            mask = layers_mask(num_layers, evenly_spaced_layers(num_layers, num_layers - layers))
            drafter.sequences.slots(batch.request_ids)
            drafter.sequences.set_masks(batch.request_ids, mask.repeat(len(batch), 1, 1, 1))
            drafter.draft(batch, 1, sample)  # what follows from the mask is worked out once
            for tokens in (1, self._longest):
                self._timings.time(("draft", layers, tokens), partial(drafter.draft, batch, tokens, sample))


def layers_kept(num_layers: int) -> list[int]:
    """The numbers of layers that draft steps are timed with, ascending."""
    return sorted({num_layers, num_layers // 2, num_layers // 4})


def measure(llm: Any, batch: int, repeats: int) -> tuple[Costs, Timings]:
    """The costs for ``batch`` sequences. ``llm`` is an engine with our method, in this process."""
    from vllm import SamplingParams

    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    timings, stopwatch = Timings(synchronize), Stopwatch(synchronize)
    engine, drafter, proposer = llm.llm_engine, drafter_of(llm), proposer_of(llm)
    longest = proposer.speculative_config.num_speculative_tokens
    rounds = MadeUpDrafts(drafter, batch, longest, timings, stopwatch)
    turns = len(rounds.lengths) + 1
    params = SamplingParams(temperature=0.0, max_tokens=repeats * turns + 8, ignore_eos=True)
    drafter.observer, unwatch = rounds, stopwatch.watch(proposer, "propose", "proposer")
    try:
        for number, prompt in enumerate(mixed_prompts(batch)):
            engine.add_request(f"costs-{batch}-{number}", prompt, params)
        while engine.has_unfinished_requests():
            verified = rounds.length
            stopwatch.reset()
            engine.step()
            stopwatch.stop()
            timings.seconds["step", verified].append(stopwatch.parts["else"])
            if "proposer" in stopwatch.parts:
                timings.seconds["proposer"].append(stopwatch.parts["proposer"])
            rounds.step += 1
    finally:
        drafter.observer = None
        unwatch()
    return _costs(timings, batch, rounds.lengths, layers_kept(drafter.decoder.num_layers), longest), timings


def _costs(timings: Timings, batch: int, lengths: list[int], kept: list[int], longest: int) -> Costs:
    """From the measurements with ``kept`` layers, and of steps that verify ``lengths`` tokens."""
    step = {layers: _line(timings, layers, longest) for layers in kept}
    layer = (step[kept[-1]][0] - step[kept[0]][0]) / (kept[-1] - kept[0])
    head = timings.median("head")
    return Costs(
        batch,
        {k: timings.median(("step", k)) for k in lengths},
        layer,
        step[kept[-1]][0] - kept[-1] * layer - head,
        head,
        statistics.median(step[layers][1] for layers in kept) + timings.median("proposer"),
        timings.median("optimize"),
    )


def _line(timings: Timings, layers: int, longest: int) -> tuple[float, float]:
    """Seconds of a draft step with ``layers`` layers and of a round of drafting with none."""
    one, many = timings.median(("draft", layers, 1)), timings.median(("draft", layers, longest))
    step = (many - one) / (longest - 1)
    return step, one - step


def read_bandwidth(num_bytes: int, repeats: int = 5) -> float:
    """Bytes per second of reading memory in a stream: the sum of a large tensor on the engine's device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = torch.ones(-(-num_bytes // 4096), 1024, dtype=torch.int32, device=device)
    timings = Timings(torch.cuda.synchronize if torch.cuda.is_available() else lambda: None)
    for _ in range(repeats + 2):
        timings.time("read", lambda: data.sum(dim=1, dtype=torch.int32))
    return data.nbytes / timings.median("read")


def bytes_per_token(model_config: Any) -> int:
    """Weights that a decode step reads: all but the embedding's other rows. Of dense, unquantised models."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # vLLM's own may be packed into another form
        model = AutoModelForCausalLM.from_config(model_config.hf_text_config, dtype=model_config.dtype)
    embedding = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.nbytes
    return int(sum(weight.nbytes for weight in model.parameters()) - embedding)


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
