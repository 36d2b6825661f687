"""Tokens per second beside plain vLLM's."""

from __future__ import annotations

import json

from clasp_vllm.tools.processes import Engine, generate
from gpu.engines import BATCHES, prompts
from gpu.report import Report


def check_speed(engines: dict[str, Engine], repeats: int, report: Report, until: float) -> None:
    """Milliseconds per decoded token and sequence, in turn; what prefill takes is subtracted."""
    for batch in BATCHES:
        times: dict[str, list[float]] = {name: [] for name in engines}
        rounds: dict[str, dict[str, float]] = {}
        for repeat in range(repeats + 1):
            for name, engine in engines.items():
                if not engine.alive:
                    continue
                short = engine.ask(generate, until, prompts=prompts(batch), tokens=16)
                long = engine.ask(generate, until, prompts=prompts(batch), tokens=144)
                if "error" in short or "error" in long:
                    report.keep("speed", f"{name}_{batch}", short if "error" in short else long)
                elif repeat:  # the first warms up
                    times[name].append(1000 * (long["seconds"] - short["seconds"]) / 128)
                    rounds[name] = long["counters"]
        for name, per_token in times.items():
            if not per_token or not times["plain"]:
                continue
            ratios = sorted(p / own for p, own in zip(times["plain"], per_token, strict=False))
            drafts = rounds[name].get("spec_decode_num_drafts", 0)
            accepted = rounds[name].get("spec_decode_num_accepted_tokens", 0)
            summary = {
                "ms_per_token": sorted(per_token),
                "ratio_to_plain": ratios,
                "mean_accepted_length": 1 + accepted / drafts if drafts else None,
                "counters": rounds[name],
            }
            report.keep("speed", f"{name}_{batch}", summary)
            report.say(
                f"{batch} requests, {name}: "
                + json.dumps({k: v for k, v in summary.items() if k != "counters"})
            )
