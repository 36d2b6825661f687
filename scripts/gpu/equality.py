"""Are answers with drafts those of plain vLLM?"""

from __future__ import annotations

import random
from typing import Any

from clasp_vllm.tools.processes import Engine, generate
from gpu.engines import QUESTION, START, patience
from gpu.report import Report

CHOOSING = ("plain", "default", "lookup")  # have no drafts, or none where these do not pay


def check_equality(engines: dict[str, Engine], report: Report, until: float) -> None:
    """Greedy tokens against plain vLLM's; the engines end here."""
    random.seed(3)
    lengths = [random.randrange(4, 60) for _ in range(16)]
    token_prompts = [{"prompt_token_ids": [random.randrange(5, 4000) for _ in range(n)]} for n in lengths]
    plain: dict[str, Any] = {}
    for name, engine in engines.items():
        started = report.keep("start", name, engine.answer(patience(until, START)))
        soon = patience(until, QUESTION)
        answer = engine.ask(generate, soon, prompts=token_prompts, tokens=96)
        again = engine.ask(generate, soon, prompts=token_prompts[:1], tokens=96)
        engine.stop()
        if "error" in answer or "error" in started:
            report.keep("equality", name, answer)
            continue
        dtype, _, kind = name.partition("_")
        if kind == "plain":
            plain[dtype] = answer["tokens"]
        if dtype not in plain:
            report.keep("equality", name, {"error": f"{dtype}_plain gave no answers to compare with"})
            continue
        same = sum(a == b for a, b in zip(plain[dtype], answer["tokens"], strict=True))
        alone = "error" not in again and again["tokens"][0] == plain[dtype][0]
        summary = {"identical": same, "of": 16, "alone_identical": alone, "counters": answer["counters"]}
        drafts, failures = (
            answer["counters"].get(k, 0) for k in ("spec_decode_num_drafts", "layer_skip_failures")
        )
        if dtype == "float32" and not (same == len(token_prompts) and alone):
            summary["error"] = "float32 must be identical"
        elif failures:
            summary["error"] = "there must be no failures"
        elif kind not in CHOOSING and not drafts:
            summary["error"] = "there must be drafts"
        report.keep("equality", name, summary)
        report.say(f"{name}: {summary}")
