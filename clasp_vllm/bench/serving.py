"""Speculative methods against plain vLLM, served over HTTP, alternating on the same machine.

Each method's server in turn runs beside one of plain vLLM; the two are asked alternately, never at the
same time, by vLLM's own `vllm bench serve`. A ratio is always that of two neighbouring measurements.

No measurement finds its prompts in the servers' prefix caches, or the plain server, which stays while methods
come and go, would have read them before. Within a measurement the caches work as ever.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clasp_vllm.bench.report import write_report
from clasp_vllm.bench.serving_options import add_arguments as add_arguments  # the command looks here
from clasp_vllm.bench.serving_options import fill_in
from clasp_vllm.tools.options import levels
from clasp_vllm.tools.prompts import (
    HELD_OUT,
    TASKS,
    WARM_UP,
    datasets,
    number_of_prompts,
    questions_of,
)
from clasp_vllm.tools.provenance import about
from clasp_vllm.tools.servers import Server, ServerError, serve
from clasp_vllm.tools.spec_bench import ServedChat, asked, chat_tokenizer, is_spec_bench


@dataclass(frozen=True)
class Workload:
    """What is asked of a server in one measurement.

    ``concurrency``: requests at once, or several such numbers in turn, as in ``options.loads``.
    """

    task: str
    concurrency: int | str
    temperature: float


@dataclass(frozen=True)
class Measurement:
    """One measurement of a method or of the plain server beside it.

    Times are in milliseconds, but ``seconds`` those of the whole. ``counters`` are those of speculation on
    /metrics. ``texts`` are the answers, in the order of the prompts, and ``tokens`` their lengths.
    ``answers_before`` counts what the server had answered since its start.
    """

    method: str
    plain: bool
    workload: Workload
    repeat: int
    tokens_per_second: float
    accepted_length: float | None
    acceptance_by_position: list[float]
    ttft_p50: float
    tpot_p50: float
    tpot_p95: float
    failed: int
    counters: dict[str, float]
    texts: list[str]
    tokens: list[int]
    seconds: float
    answers_before: int


def measure(
    server: Server, workload: Workload, dataset: list[str], prompts: int, salt: str = ""
) -> dict[str, Any]:
    """Runs of `vllm bench serve`, one for each level of the load; their result, in one.

    Args:
        prompts: at least so many for each level.
        salt: prompts are found in the server's prefix cache only if they were asked with the same one.

    Raises:
        ServerError: a request failed.
    """
    body: dict[str, Any] = {"cache_salt": salt} if salt else {}
    if is_spec_bench(workload.task):
        body["add_special_tokens"] = False  # the chat template has put them in
    options = [*dataset, f"--extra-body={json.dumps(body)}"]
    results = [
        _ask(server, workload.temperature, level, options, number_of_prompts(prompts, level, workload.task))
        for level in levels(workload.concurrency)
    ]
    if len(results) == 1:
        return results[0]
    import numpy as np

    merged: dict[str, Any] = {
        key: sum(result[key] for result in results) for key in ("total_output_tokens", "duration", "failed")
    }
    for key in ("generated_texts", "output_lens"):
        merged[key] = [of_answer for result in results for of_answer in result[key]]
    times = {
        "ttft": [seconds for result in results for seconds in result["ttfts"]],
        "tpot": [
            sum(gaps) / (count - 1)
            for result in results
            for gaps, count in zip(result["itls"], result["output_lens"], strict=True)
            if count > 1
        ],
    }
    for name, seconds in times.items():
        merged |= {f"p{p}_{name}_ms": 1000 * float(np.percentile(seconds, p)) for p in (50, 95)}
    return merged


def _ask(
    server: Server, temperature: float, concurrency: int, dataset: list[str], prompts: int
) -> dict[str, Any]:
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    options = [
        f"--base-url=http://127.0.0.1:{server.port}",
        f"--model={server.model}",
        f"--max-concurrency={concurrency}",
        f"--temperature={temperature}",
        "--endpoint=/v1/completions",
        "--save-detailed",
        "--disable-tqdm",
        "--disable-shuffle",
        "--no-oversample",
        "--skip-chat-template",
        "--percentile-metrics=ttft,tpot",
        "--metric-percentiles=50,95",
        f"--num-prompts={prompts}",
        *dataset,
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        result: dict[str, Any] = main(parser.parse_args(options))
    if result["failed"]:
        why = next(error for error in result["errors"] if error)
        raise ServerError(
            f"{result['failed']} of {prompts} requests failed: {why.strip()}; see {server.log}. Is "
            "--max-model-len large enough for the prompts and --max-tokens?"
        )
    return result


def speculation(server: Server) -> dict[str, float]:
    """vLLM's and our counters of speculation."""
    from clasp_vllm.drafting.statistics import GAUGES  # imports torch

    prefixes = ("spec_decode_", "layer_skip_")
    gauges = {f"layer_skip_{name}" for name in GAUGES}
    metrics = server.metrics()
    return {name: metrics[name] for name in metrics if name.startswith(prefixes) and name not in gauges}


def accepted(counters: dict[str, float]) -> tuple[float | None, list[float]]:
    """Mean accepted length, and the share of drafts of which each position was accepted."""
    drafts = counters.get("spec_decode_num_drafts", 0.0)
    if not drafts:
        return None, []
    at = [name for name in counters if name.startswith("spec_decode_num_accepted_tokens_per_pos[")]
    length = 1 + counters["spec_decode_num_accepted_tokens"] / drafts
    return length, [counters[f"{at[0].partition('[')[0]}[{i}]"] / drafts for i in range(len(at))]


def profiles(args: argparse.Namespace, methods: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Where the time goes with plain vLLM and with each method: `clasp-vllm profile`, each in its process."""
    with tempfile.TemporaryDirectory() as folder:
        for name, batch in itertools.product(("plain", *methods), args.profile):
            path = Path(folder) / "profile.json"
            command = [sys.executable, "-m", "clasp_vllm.cli", "profile", args.model, f"--json={path}"]
            command += [f"--batch={batch}", f"--max-tokens={args.max_tokens}"]
            command += [f"--prompts={max(args.prompts, 2 * batch)}"]
            if name != "plain":
                command.append(f"--speculative-config={methods[name]}")
            log = args.output / "logs" / "profile.log"
            with log.open("a") as output:
                subprocess.run(
                    [*command, "--", *args.server_arguments], stdout=output, stderr=output, check=True
                )
            yield {"method": name, "batch": batch, **json.loads(path.read_text())}


def workloads(args: argparse.Namespace) -> list[Workload]:
    """All combinations, but a single task's few prompts never run beside themselves."""
    every = itertools.product(args.tasks, args.concurrency, args.temperature)
    return [Workload(*one) for one in every if one[0] not in TASKS or max(levels(one[1])) <= HELD_OUT]


def compare(
    method: str,
    servers: dict[bool, Server],
    sets: dict[str, list[str]],
    args: argparse.Namespace,
    advance: Any,
) -> Iterator[Measurement]:
    """All measurements of one method: plain first in even repeats, last in odd ones."""
    for plain in (True, False):  # what is compiled on the first requests; few, for methods learn from them
        measure(servers[plain], Workload(WARM_UP, 2, 0.0), sets[WARM_UP], min(args.prompts, HELD_OUT))
    for repeat, workload in itertools.product(range(args.repeats), workloads(args)):
        for plain in (True, False) if repeat % 2 == 0 else (False, True):
            # It was idle, and what of it has left the memory meanwhile would count against either by chance.
            _ask(servers[plain], 0.0, 1, sets[WARM_UP], 1)
            before = speculation(servers[plain])
            answers_before = int(servers[plain].metrics().get("request_success", 0))
            result = measure(servers[plain], workload, sets[workload.task], args.prompts, uuid.uuid4().hex)
            counters = {k: v - before.get(k, 0) for k, v in speculation(servers[plain]).items()}
            advance()
            yield Measurement(
                method,
                plain,
                workload,
                repeat,
                result["total_output_tokens"] / result["duration"],
                *accepted(counters),
                result["p50_ttft_ms"],
                result["p50_tpot_ms"],
                result["p95_tpot_ms"],
                result["failed"],
                counters,
                result["generated_texts"],
                result["output_lens"],
                result["duration"],
                answers_before,
            )


def compare_all(
    args: argparse.Namespace, methods: dict[str, str], tokenizer: Any, results: dict[str, Any], progress: Any
) -> None:
    """Add all measurements to the results, written after each: every method beside one server of plain vLLM.

    Args:
        tokenizer: with the model's chat template; None: no task needs one.
        progress: a ``rich`` progress display.

    Raises:
        ServerError: a server did not start, or a request failed.
    """
    logs = args.output / "logs"
    bar = progress.add_task(
        "starting plain vLLM", total=2 * args.repeats * len(workloads(args)) * len(methods)
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(args.model, *args.server_arguments, log=logs / "plain.log", port=args.port) as plain,
    ):
        chat = ServedChat(plain, tokenizer, args.max_tokens)
        sets = datasets(args, Path(folder), chat)
        spec_bench_tasks = filter(is_spec_bench, args.tasks)
        results["spec_bench"] = {t: asked(questions_of(args, t), chat) for t in spec_bench_tasks}
        for name, config in methods.items():
            progress.update(bar, description=f"{name}: starting its server")
            log = logs / f"{''.join(c if c.isalnum() else '_' for c in name)}.log"
            arguments = (*args.server_arguments, "--speculative-config", config)
            with serve(args.model, *arguments, log=log, port=args.port + 1) as other:
                progress.update(bar, description=name)
                servers = {True: plain, False: other}
                for measurement in compare(name, servers, sets, args, lambda: progress.advance(bar)):
                    results["measurements"].append(asdict(measurement))
                    save(results, args.output)  # it may be interrupted
            save(results, args.output)
            write_report(results, args.output)


def save(results: dict[str, Any], folder: Path) -> None:
    """Write the figures."""
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    try:
        methods = fill_in(args)
        tokenizer = chat_tokenizer(args.model) if any(map(is_spec_bench, args.tasks)) else None
    except ValueError as error:
        console.print(f"clasp-vllm: error: {error}", markup=False)
        return 2
    logs = args.output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "about": {"model": args.model, **about(args.model)},
        "methods": methods,
        "measurements": [],
        "profiles": [],
        "costs": args.costs,
    }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped too
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        try:
            compare_all(args, methods, tokenizer, results, progress)
        except ServerError as error:
            console.print(str(error), markup=False)
            return 1
        bar = progress.add_task("profiling", total=len(args.profile) * (1 + len(methods)))
        try:
            for profile in profiles(args, methods):
                results["profiles"].append(profile)
                progress.advance(bar)
        except subprocess.CalledProcessError:
            console.print(f"profiling failed; see {logs / 'profile.log'}", markup=False)
            return 1
    save(results, args.output)
    write_report(results, args.output)
    console.print((args.output / "results.md").read_text(), markup=False)
    return 0
