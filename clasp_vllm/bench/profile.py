"""Where the time of serving goes: verify, draft, optimise and everything else, adding up to the whole."""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clasp_vllm.config import read_settings
from clasp_vllm.tools import engine
from clasp_vllm.tools.options import engine_settings, number
from clasp_vllm.tools.processes import counters
from clasp_vllm.tools.prompts import mixed_prompts
from clasp_vllm.tools.provenance import about


@dataclass
class Profile:
    """Exclusive seconds by part; they add up to ``seconds``.

    Attributes:
        seconds: wall time of generating.
        parts: seconds by what the engine was doing, exclusive of each other.
        calls: how often each part was entered.
        tokens: tokens generated.
        counters: vLLM's and our own counters of speculation.
    """

    seconds: float
    parts: dict[str, float]
    calls: dict[str, int]
    tokens: int
    counters: dict[str, float]


class Stopwatch:
    """Exclusive times of nested calls: while an inner part runs, the outer one's clock stands still."""

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self._synchronize = synchronize
        self.reset()

    def reset(self) -> None:
        """Start again, with everything under "else"."""
        self.parts: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._stack = ["else"]
        self._since = time.perf_counter()

    def _switch(self) -> None:
        self._synchronize()
        now = time.perf_counter()
        self.parts[self._stack[-1]] += now - self._since
        self._since = now

    def stop(self) -> None:
        """Book the time since the last change."""
        self._switch()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Book the time spent within under ``name``.

        ``{}`` in it stands for what the part around it begins with.
        """
        self._switch()
        self._stack.append(name.format(self._stack[-1].partition(":")[0]))
        self.calls[self._stack[-1]] += 1
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def watch(self, owner: Any, name: str, part: str) -> Callable[[], None]:
        """Book the time spent in ``owner.name`` under ``part``, until the returned function is called."""
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return original(*args, **kwargs)

        setattr(owner, name, watched)
        return lambda: setattr(owner, name, original)


def watch_engine(llm: Any) -> Stopwatch:
    """Watch the parts of an engine in this process."""
    import torch

    stopwatch = Stopwatch(torch.cuda.synchronize if torch.cuda.is_available() else lambda: None)
    runner, proposer, ours = engine.model_runner(llm), engine.proposer(llm), engine.drafter(llm)
    stopwatch.watch(runner, "execute_model", "verify: forward")
    stopwatch.watch(runner, "sample_tokens", "verify: sampling and bookkeeping")
    if ours is None:
        if proposer is not None:
            stopwatch.watch(proposer, "propose", "draft: forward")
        return stopwatch
    import clasp_vllm.engine.attention as attention

    stopwatch.watch(proposer, "propose", "draft: preparation")
    stopwatch.watch(ours, "draft", "draft: bookkeeping")
    stopwatch.watch(ours.passes, "draft_step", "draft: forward")
    stopwatch.watch(proposer.model, "compute_logits", "{}: head")
    stopwatch.watch(attention, "build_attn_metadata", "{}: attention metadata")
    stopwatch.watch(ours.policy, "optimize", "optimise: masks")
    stopwatch.watch(ours.passes, "programme", "optimise: forward")
    stopwatch.watch(ours.passes.attention, "copy_blocks", "optimise: copies")
    return stopwatch


def profile(
    model: str,
    speculative_config: object,
    prompts: list[str],
    batch: int,
    max_tokens: int,
    settings: dict[str, Any],
) -> Profile:
    """Generate greedily for ``prompts``, ``batch`` of them at any time, and say where the time went.

    Needs ``stay_in_process`` at the start of the process. The first ``batch`` prompts
    warm up.
    """
    from vllm import LLM, SamplingParams

    settings = settings | {"max_num_seqs": batch, "disable_log_stats": False}
    llm = LLM(model, speculative_config=speculative_config, **settings)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    llm.generate(prompts[:batch], params, use_tqdm=False)
    stopwatch = watch_engine(llm)
    before = counters(llm)
    stopwatch.reset()
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    stopwatch.stop()
    seconds = time.perf_counter() - started
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    counted = {name: value - before.get(name, 0) for name, value in counters(llm).items()}
    return Profile(seconds, dict(stopwatch.parts), dict(stopwatch.calls), tokens, counted)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("model", help="name or path")
    parser.add_argument("--speculative-config", help="as for vllm serve; without it plain vLLM")
    parser.add_argument("--batch", type=number(1), default=1, help="requests at once (default %(default)s)")
    parser.add_argument("--prompts", type=number(1), default=10, help="how many, over all tasks in turn")
    parser.add_argument("--max-tokens", type=number(1), default=64, help="tokens per answer")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.epilog = "Arguments after -- are those of vllm serve."


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    engine.stay_in_process()
    from rich.console import Console
    from rich.table import Table

    prompts = mixed_prompts(args.prompts)
    config = read_settings(args.speculative_config) if args.speculative_config else None
    result = profile(
        args.model,
        config,
        prompts,
        args.batch,
        args.max_tokens,
        engine_settings(args.model, args.server_arguments),
    )
    table = Table("part", "seconds", "share", "calls", "ms per call", title=f"{args.model}, {config}")
    for part, seconds in sorted(result.parts.items(), key=lambda item: -item[1]):
        calls = result.calls.get(part, 0)
        mean = f"{1000 * seconds / calls:.3f}" if calls else ""
        table.add_row(part, f"{seconds:.3f}", f"{seconds / result.seconds:.1%}", str(calls or ""), mean)
    table.add_row("all", f"{result.seconds:.3f}", "100 %", "", "")
    console = Console()
    console.print(table)
    facts = about(args.model)
    console.print("\n".join(f"{name}: {value}" for name, value in facts.items()), markup=False)
    console.print(
        f"{result.tokens} tokens, {result.tokens / result.seconds:.1f} per second; {result.counters}"
    )
    if args.json:
        args.json.write_text(json.dumps({"about": facts, **asdict(result)}, indent=2) + "\n")
    return 0
