"""Tokens per second beside plain vLLM's."""

from __future__ import annotations

import json
from typing import Any

from clasp_vllm.tools.processes import Engine, generate
from gpu.engines import BATCHES, QUESTION, patience, prompts
from gpu.report import Report


def measure_again(llm: Any) -> dict[str, Any]:
    """What passes cost: an engine that starts beside others measures it wrong. Runs in its process."""
    from clasp_vllm.engine.steps import engine_steps
    from clasp_vllm.tools.engine import drafter, model_runner

    runner = model_runner(llm)
    ours = drafter(llm)
    if ours is None or ours.controller is None:
        return {}
    ours.start(runner.device, engine_steps(runner))
    return {"costs": str(ours.controller.costs)}


def check_speed(engines: dict[str, Engine], repeats: int, report: Report, until: float) -> None:
    """Milliseconds per decoded token and sequence, in turn; what prefill takes is subtracted."""
    for name, engine in engines.items():
        if engine.alive:
            report.keep("costs", name, engine.ask(measure_again, patience(until, QUESTION)))
    for batch in BATCHES:
        times: dict[str, list[float]] = {name: [] for name in engines}
        rounds: dict[str, dict[str, float]] = {}
        for repeat in range(repeats + 1):
            for name, engine in engines.items():
                if not engine.alive:
                    continue
                soon = patience(until, QUESTION)
                short = engine.ask(generate, soon, prompts=prompts(batch), tokens=16)
                long = engine.ask(generate, soon, prompts=prompts(batch), tokens=144)
                if "error" in short or "error" in long:
                    report.keep("speed", f"{name}_{batch}", short if "error" in short else long)
                elif repeat:  # the first warms up
                    times[name].append(1000 * (long["seconds"] - short["seconds"]) / 128)
                    rounds[name] = long["counters"]
        for name, per_token in times.items():
            if not per_token:
                continue
            ratios = sorted(p / own for p, own in zip(times.get("plain", []), per_token, strict=False))
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
