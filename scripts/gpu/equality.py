"""Are answers with drafts those of plain vLLM?"""

from __future__ import annotations

import random
from typing import Any

from clasp_vllm.tools.processes import Engine, generate
from gpu.report import Report


def check_equality(engines: dict[str, Engine], report: Report, until: float) -> None:
    """Greedy tokens against plain vLLM's; the engines end here."""
    random.seed(3)
    lengths = [random.randrange(4, 60) for _ in range(16)]
    token_prompts = [{"prompt_token_ids": [random.randrange(5, 4000) for _ in range(n)]} for n in lengths]
    plain: dict[str, Any] = {}
    for name, engine in engines.items():
        started = report.keep("start", name, engine.answer(until))
        answer = engine.ask(generate, until, prompts=token_prompts, tokens=96)
        again = engine.ask(generate, until, prompts=token_prompts[:1], tokens=96)
        engine.stop()
        if "error" in answer or "error" in started:
            report.keep("equality", name, answer)
            continue
        dtype = name.partition("_")[0]
        plain.setdefault(dtype, answer["tokens"])
        same = sum(a == b for a, b in zip(plain[dtype], answer["tokens"], strict=True))
        alone = "error" not in again and again["tokens"][0] == plain[dtype][0]
        summary = {"identical": same, "of": 16, "alone_identical": alone, "counters": answer["counters"]}
        drafts, failures = (
            answer["counters"].get(k) for k in ("spec_decode_num_drafts", "layer_skip_failures")
        )
        if (dtype == "float32" and same < len(token_prompts)) or failures or drafts == 0:
            summary["error"] = "float32 must be identical, drafts more than 0 and failures 0"
        report.keep("equality", name, summary)
        report.say(f"{name}: {summary}")
