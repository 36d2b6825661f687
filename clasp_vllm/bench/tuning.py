"""What the controller would choose on this machine, by requests at once and draft weights."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import yaml
from torch import Tensor

from clasp_vllm.bench.serving import accepted
from clasp_vllm.config import ConfigError, LayerSkipConfig, parse_config, read_settings
from clasp_vllm.control.planner import WORTH_IT, Choice
from clasp_vllm.drafting.batch import SequenceBatch
from clasp_vllm.drafting.draft import DraftRound
from clasp_vllm.drafting.observer import RoundObserver
from clasp_vllm.tools.engine import drafter as drafter_of
from clasp_vllm.tools.options import engine_settings, number, numbers
from clasp_vllm.tools.processes import Answer, Engine, generate
from clasp_vllm.tools.prompts import mixed_prompts, read_prompts
from clasp_vllm.tools.provenance import about

WEIGHTS = get_args(LayerSkipConfig.model_fields["draft_weights"].annotation)


@dataclass(frozen=True)
class Tuned:
    """What the controller chose for a load.

    Attributes:
        weights: those of drafts.
        requests: at once.
        skipped: layers, mostly, of drafts by skipping.
        length, ngram: tokens drafted and looked up at most; 0 = none were.
        window: tokens of context that drafts attended to at most; None: all.
        ratio: tokens per second over plain decoding's: the tokens made, and the seconds that its steps should
            take by the costs measured. Where nothing was drafted, what its best choice promised.
        drafted: share of steps that had drafts.
        accepted: mean accepted length; 0 = nothing was drafted.
        plain, draft: seconds of a plain step and of a draft step.
    """

    weights: str
    requests: int
    skipped: int
    length: int
    ngram: int
    window: int | None
    ratio: float
    drafted: float
    accepted: float
    plain: float
    draft: float

    @property
    def pays(self) -> bool:
        """Whether drafts gain as much as the controller asks for."""
        return self.drafted > 0 and self.ratio >= WORTH_IT


class ChoiceRecorder(RoundObserver):
    """Keeps what was chosen in rounds of so many sequences, and what came of it.

    Attributes:
        choices: the best way to speculate, whether or not it was taken.
        taken: those of rounds with drafts.
    """

    def __init__(self, drafter: Any, requests: int) -> None:
        self.choices: list[Choice] = []
        self.taken: list[Choice] = []
        self.costs: tuple[float, float] = (0.0, 0.0)
        self._drafter, self._requests = drafter, requests
        self._plain_before = drafter.statistics.total.plain_steps
        self._unverified: Choice | None = None
        self._verified: list[tuple[Choice, int, Tensor]] = []  # with tokens run and rejected

    def round_ended(self, batch: SequenceBatch, drafted: DraftRound | None) -> None:
        """See ``RoundObserver``."""
        controller = self._drafter.controller
        if len(batch) == self._requests and drafted is not None and controller.last is not None:
            self.choices.append(controller.last)
            self.costs = controller.step_seconds(self._requests)
            if drafted.choice.length or drafted.choice.ngram:
                self._unverified = drafted.choice
                self.taken.append(drafted.choice)

    def verified(self, request_ids: Sequence[str], lengths: np.ndarray, rejected: Tensor | None) -> None:
        """See ``RoundObserver``."""
        choice, self._unverified = self._unverified, None
        if choice is not None and rejected is not None and len(request_ids) == self._requests:
            self._verified.append((choice, int(lengths.sum()), rejected.sum()))

    @property
    def plain_steps(self) -> int:
        """Steps without drafts."""
        return int(self._drafter.statistics.total.plain_steps - self._plain_before)

    def ratio(self) -> float:
        """See ``Tuned``."""
        if not self._verified:
            return statistics.median(choice.ratio for choice in self.choices[len(self.choices) // 2 :])
        plain = self.costs[0]
        tokens = sum(run - int(rejected) for _, run, rejected in self._verified)
        seconds = sum(choice.seconds for choice, _, _ in self._verified)
        steps = self.plain_steps + tokens / self._requests
        return plain * steps / (plain * self.plain_steps + seconds)


def try_load(llm: Any, requests: int, prompts: list[str], tokens: int, temperature: float) -> Answer:
    """Run in an engine: so many requests at once; what the controller chose, as ``Tuned`` without weights."""
    drafter = drafter_of(llm)
    if drafter is None or drafter.controller is None:
        raise ValueError("there is no controller to ask: the configuration has adaptive: false")
    recorder = drafter.observer = ChoiceRecorder(drafter, requests)
    try:
        answer = generate(llm, prompts, tokens, temperature)
    finally:
        drafter.observer = None
    choices = recorder.choices
    if not choices:
        raise ValueError(f"no round had {requests} requests: --max-num-seqs may be lower")
    by_skipping = [choice for choice in recorder.taken if choice.length]
    ways = [(choice.budget, choice.context) for choice in by_skipping or choices]
    budget, context = statistics.mode(ways)
    plain, draft = recorder.costs
    return {
        "requests": requests,
        "skipped": drafter.options.budgets[budget],
        "length": max((choice.length for choice in recorder.taken), default=0),
        "ngram": max((choice.ngram for choice in recorder.taken), default=0),
        "window": drafter.options.contexts[context],
        "ratio": recorder.ratio(),
        "drafted": len(recorder.taken) / (len(recorder.taken) + recorder.plain_steps),
        "accepted": accepted(answer["counters"])[0] or 0.0,
        "plain": plain,
        "draft": draft,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("model", help="name or path")
    parser.add_argument("--requests", type=numbers(1), default=[1, 2, 4, 8, 16, 32], help="requests at once")
    parser.add_argument(
        "--draft-weights",
        type=lambda text: text.split(","),
        default=["target", "int8"],
        help=f"to compare, of {', '.join(WEIGHTS)} (default target,int8)",
    )
    parser.add_argument(
        "--speculative-config", default='{"method": "clasp"}', help="to begin with (default %(default)s)"
    )
    parser.add_argument(
        "--prompts", type=Path, help='file of lines {"prompt": "..."} (default: the package\'s)'
    )
    parser.add_argument("--max-tokens", type=number(8), default=96, help="per answer (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="default %(default)s")
    parser.add_argument("--output", type=Path, default=Path("clasp.yaml"), help="default %(default)s")
    parser.add_argument("--plot", type=Path, help="draw what is expected, to this PNG file")
    parser.epilog = "Arguments after -- are those of vllm serve."


def main(args: argparse.Namespace) -> int:
    """Run the command: prints Markdown, writes a configuration."""
    try:
        base = read_settings(args.speculative_config)
        configs = {weights: {**base, "draft_weights": weights} for weights in args.draft_weights}
        for config in configs.values():
            parse_config(config)
        prompts = read_prompts(args.prompts, f"--prompts {args.prompts}") if args.prompts else []
    except (ConfigError, ValueError) as error:
        print(f"clasp-vllm: error: {error}", file=sys.stderr)
        return 2
    settings = engine_settings(args.model, args.server_arguments)
    settings = {"max_num_seqs": max(args.requests)} | settings
    tuned, refused = measure(args, configs, settings, prompts)
    for weights, why in refused.items():
        print(f"clasp-vllm: {weights}: {why}", file=sys.stderr)
    if not tuned:
        return 1
    facts = {"model": args.model, **about(args.model)}
    print("\n".join(f"- {name}: {value}" for name, value in facts.items()) + "\n")
    print(table(tuned))
    config, why = recommend(tuned, configs)
    args.output.write_text(f"# {why}\n# {facts['machine']}, {facts['date']}\n{yaml.safe_dump(config)}")
    print(f"\n{why}\nwritten: {args.output}")
    if args.plot:
        draw(tuned, args.plot)
        print(f"written: {args.plot}")
    return 0


def measure(
    args: argparse.Namespace,
    configs: dict[str, dict[str, Any]],
    settings: dict[str, Any],
    prompts: list[str],
) -> tuple[list[Tuned], dict[str, str]]:
    """All loads in an engine for each of the draft weights, and why others have none."""
    from rich.progress import Progress

    tuned: list[Tuned] = []
    refused: dict[str, str] = {}
    logs = Path(tempfile.mkdtemp(prefix="clasp-vllm-tune-"))
    with Progress() as progress:
        bar = progress.add_task("starting", total=len(configs) * len(args.requests))
        for weights, config in configs.items():
            engine = Engine(weights, args.model, config, settings, logs / f"{weights}.log")
            answer = engine.answer()
            for requests in args.requests:
                progress.update(bar, description=f"{weights}, {requests} at once")
                if "error" not in answer:
                    asked = (prompts * requests)[:requests] or mixed_prompts(requests)
                    load = {"requests": requests, "prompts": asked, "tokens": args.max_tokens}
                    answer = engine.ask(try_load, **load, temperature=args.temperature)
                if "error" in answer:
                    last = answer["error"].strip().splitlines()[-1]
                    refused.setdefault(weights, f"{last} (log: {logs / f'{weights}.log'})")
                else:
                    tuned.append(Tuned(weights, **answer))
                progress.advance(bar)
            engine.stop()
    return tuned, refused


def table(tuned: list[Tuned]) -> str:
    """A row for each load and draft weights, in Markdown."""
    heads = ["requests", "draft weights", "expected", "layers skipped", "draft tokens", "looked up"]
    heads += ["context", "steps with drafts", "accepted length", "plain step, ms", "draft step, ms"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for one in sorted(tuned, key=lambda one: one.requests):
        expected = f"{one.ratio:.2f}" if one.drafted else f"off ({one.ratio:.2f} at best)"
        accepted = f"{one.accepted:.2f}" if one.accepted else ""
        cells = [one.requests, one.weights, expected, one.skipped, one.length, one.ngram]
        cells += [one.window or "all", f"{one.drafted:.0%}", accepted]
        cells += [f"{1000 * one.plain:.1f}", f"{1000 * one.draft:.1f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def recommend(tuned: list[Tuned], configs: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """The configuration that gains most over all loads, and why; off counts as plain decoding."""

    def worth(weights: str) -> float:
        ratios = [one.ratio if one.drafted else 1.0 for one in tuned if one.weights == weights]
        return statistics.geometric_mean(ratios)

    best = max(dict.fromkeys(one.weights for one in tuned), key=worth)
    paying = [one for one in tuned if one.weights == best and one.pays]
    config = dict(configs[best])
    if not paying:
        loads = ", ".join(str(n) for n in sorted({one.requests for one in tuned}))
        return (
            config,
            f"No drafts pay at {loads} requests: the controller leaves them off but for trials.",
        )
    config["num_speculative_tokens"] = max(max(one.length, one.ngram) for one in paying)
    loads = ", ".join(f"{one.ratio:.2f} at {one.requests}" for one in paying)
    return config, f"Expected against plain vLLM, by requests at once: {loads}; elsewhere nothing."


def draw(tuned: list[Tuned], path: Path) -> None:
    """Expected ratios by requests at once, a line for each of the draft weights."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.5, 3.6))
    for weights in dict.fromkeys(one.weights for one in tuned):
        points = [one for one in tuned if one.weights == weights]
        axis.plot([one.requests for one in points], [one.ratio for one in points], "o-", label=weights)
    axis.axhline(1.0, color="#888888", linewidth=0.8)
    axis.set(xscale="log", xlabel="requests at once", ylabel="expected against plain vLLM")
    axis.set_xticks(sorted({one.requests for one in tuned}), minor=False)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.minorticks_off()
    axis.legend(title="draft weights", frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
