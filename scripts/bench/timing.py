"""What one client of a server can learn of another's requests by timing its own.

    .venv/bin/python scripts/bench/timing.py MODEL --method 'clasp={"method":"clasp"}' \\
        --output timing.json -- ARGUMENTS

Two requests of another client are of one of two tasks (JSON or prose), with as many tokens in prompt and
answer either way. The observer always asks the same, while they run or after them, and sees of each step how
long it took and how many tokens it brought. A classifier guesses the task from that: 0.5 is chance. The table
has the share of right guesses, with a standard error, for plain vLLM and for each method.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from clasp_vllm.config import read_settings
from clasp_vllm.tools.options import engine_settings, number, split_arguments
from clasp_vllm.tools.processes import Engine
from clasp_vllm.tools.prompts import task_prompts
from clasp_vllm.tools.provenance import about

TASKS = ("json", "prose")
OBSERVER = "A short list of things to take along on a walk in the mountains:"
OTHERS = 2  # requests of the other client
PROMPT, ANSWER = 24, 32  # tokens


def observe(llm: Any, task: int, trial: int, at_once: bool) -> dict[str, Any]:
    """Seconds and tokens of the steps of the observer's request."""
    from vllm import SamplingParams

    engine, encode = llm.llm_engine, llm.get_tokenizer().encode
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER, ignore_eos=True)
    prompts = task_prompts(TASKS[task])
    for i in range(OTHERS):
        tokens = encode(prompts[(OTHERS * trial + i) % len(prompts)])[:PROMPT]
        tokens += encode(" ") * (PROMPT - len(tokens))
        engine.add_request(f"other {i}", {"prompt_token_ids": tokens}, params)
    if not at_once:
        while engine.has_unfinished_requests():
            engine.step()
    engine.add_request("observer", {"prompt_token_ids": encode(OBSERVER)}, params)
    seconds: list[float] = []
    steps: list[int] = []
    seen = 0
    while engine.has_unfinished_requests():
        started = time.perf_counter()
        outputs = {output.request_id: output for output in engine.step()}
        taken = time.perf_counter() - started
        if "observer" in outputs:
            tokens = len(outputs["observer"].outputs[0].token_ids)
            seconds.append(round(taken, 6))
            steps.append(tokens - seen)
            seen = tokens
    return {"seconds": seconds, "tokens": steps}


def features(seen: dict[str, list[float]]) -> list[float]:
    """Of an observation, whatever the observer was asked."""
    seconds, tokens = seen["seconds"][1:], seen["tokens"][1:]  # the first step reads the prompt
    return [
        statistics.mean(seconds),
        statistics.median(seconds),
        statistics.pstdev(seconds),
        sum(seconds),
        statistics.mean(tokens),
        float(len(tokens)),
    ]


def right_guesses(observed: list[dict[str, Any]]) -> str:
    """The share of tasks guessed right, each by what was learnt from all others, and its standard error."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import LeaveOneOut, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    tasks = np.array([one["task"] for one in observed])
    values = np.array([features(one["seen"]) for one in observed])
    model = make_pipeline(StandardScaler(), LogisticRegression())
    right = float((cross_val_predict(model, values, tasks, cv=LeaveOneOut()) == tasks).mean())
    return f"{right:.2f} ± {(max(right * (1 - right), 0.25 / len(tasks)) / len(tasks)) ** 0.5:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--method", action="append", default=[], metavar="NAME=CONFIG")
    parser.add_argument("--trials", type=number(4), default=40, help="of each kind")
    parser.add_argument("--output", type=Path, help="JSON file for everything")
    parser.epilog = "Arguments after -- are those of vllm serve."
    own_arguments, server_arguments = split_arguments(sys.argv[1:])
    args = parser.parse_args(own_arguments)
    settings = engine_settings(args.model, server_arguments)
    logs = Path(tempfile.mkdtemp(prefix="timing-"))
    print(f"logs: {logs}", flush=True)
    methods = dict(text.partition("=")[::2] for text in args.method)
    tasks = np.random.default_rng(0).permutation(args.trials) % 2
    lines = ["| | while the other's requests run | after them |", "|---|---|---|"]
    results = {}
    for name, config in {"plain vLLM": "", **methods}.items():
        engine = Engine(
            name, args.model, read_settings(config) if config else None, settings, logs / f"{len(lines)}.log"
        )
        started = engine.answer()
        if "error" in started:
            raise SystemExit(f"{name}: {started['error']}")
        results[name] = {"at once": [], "after": []}
        for trial, task in enumerate(track([0, 0, *tasks.tolist()], description=name)):
            for when, observed in results[name].items():
                arguments = {"task": int(task), "trial": trial, "at_once": when == "at once"}
                seen = engine.ask(observe, **arguments)
                if "error" in seen:
                    raise SystemExit(f"{name}: {seen['error']}")
                if trial > 1:  # the first ones warm the engine up
                    observed.append({"task": int(task), "seen": seen})
        engine.stop()
        lines.append(f"| {name} | {' | '.join(map(right_guesses, results[name].values()))} |")
    print("\n".join(lines))
    if args.output:
        result = {"about": about(args.model), "table": lines, "observed": results}
        args.output.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
