"""Serve a model with plain vLLM and with CLaSp, ask both the same over HTTP, and print both speeds.

Greedy outputs must be equal; on a GPU or in bfloat16 two runs of plain vLLM may differ too, so the demo
model is run in float32 unless --dtype says otherwise.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import openai
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from clasp_vllm.bench.options import split_arguments
from clasp_vllm.bench.servers import Server, ServerError, serve

ROOT = Path(__file__).parents[2]
DEMO_MODEL = Path(__file__).with_name("model")
PROMPTS = {
    "maths": "Question: Natalia sold clips to 48 of her friends in April, and then she sold half as many "
    "clips in May. How many clips did Natalia sell altogether in April and May?\nAnswer:",
    "code": 'def parse(self, text):\n    """Parse the text."""\n',
    "prose": '"My dear Holmes," said I,',
    "SQL": "Question: List the name and age of the top 5 users by score.\nSQL:",
    "JSON": "Text: Eve is a 64 year old baker who lives in Delhi.\nJSON:",
}


@dataclass
class Run:
    """What one server answered."""

    texts: dict[str, str]
    repeatable: bool
    tokens: int
    seconds: float
    counters: dict[str, float]
    skipped: str | None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def main() -> int:
    args = _arguments()
    console = Console()
    logs = Path(args.logs or tempfile.mkdtemp(prefix="clasp-demo-"))
    logs.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    plain_arguments = _server_arguments(args)
    runs = {}
    try:
        for name, extra in (("plain vLLM", []), ("CLaSp", ["--speculative-config", args.config])):
            runs[name] = _run(console, args, name, [*plain_arguments, *extra], logs)
    except ServerError as error:
        console.print(f"[red]{error}[/red]", markup=True)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; the servers are stopped.")
        return 130
    return _report(console, runs["plain vLLM"], runs["CLaSp"], args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="All further arguments go to both servers, after `--`."
    )
    parser.add_argument(
        "model", nargs="?", default=str(DEMO_MODEL), help="name or path (default: the demo model)"
    )
    parser.add_argument(
        "--config", default=str(ROOT / "configs" / "clasp.yaml"), help="the speculative configuration"
    )
    parser.add_argument("--dtype", help="float32 for the demo model, else vLLM's choice")
    parser.add_argument("--port", type=int, default=8000, help="port to try first")
    parser.add_argument("--max-tokens", type=int, default=96, help="tokens per answer")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds over the prompts")
    parser.add_argument("--logs", help="folder for the servers' logs")
    words, server_arguments = split_arguments(sys.argv[1:])
    return parser.parse_args(words, argparse.Namespace(server_arguments=server_arguments))


def _server_arguments(args: argparse.Namespace) -> list[str]:
    arguments = list(args.server_arguments)
    is_demo = Path(args.model) == DEMO_MODEL
    if args.dtype or is_demo:
        arguments += ["--dtype", args.dtype or "float32"]
    if is_demo:
        arguments += [
            "--max-model-len",
            "1024",
            "--max-num-seqs",
            "8",
            "--kv-cache-memory-bytes",
            str(1 << 30),
        ]
    return arguments


def _run(console: Console, args: argparse.Namespace, name: str, arguments: list[str], logs: Path) -> Run:
    log = logs / f"{name.split()[0].lower()}.log"
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{name}: starting the server (log: {log})")
        with serve(args.model, *arguments, log=log, port=args.port) as server:
            progress.update(task, description=f"{name}: serving on port {server.port}, asking")
            run = _ask(server, args)
        progress.update(task, description=f"{name}: done, {run.tokens_per_second:.1f} tokens per second")
    return run


def _ask(server: Server, args: argparse.Namespace) -> Run:
    client = openai.OpenAI(base_url=server.url, api_key="none", timeout=600)
    texts = {
        domain: _stream(client, server, prompt, args)[0] for domain, prompt in PROMPTS.items()
    }  # warm-up
    tokens, repeatable, started = 0, True, time.perf_counter()
    for _ in range(args.repeats):
        for domain, prompt in PROMPTS.items():
            text, count = _stream(client, server, prompt, args)
            tokens += count
            repeatable &= text == texts[domain]
    seconds = time.perf_counter() - started
    deadline = time.monotonic() + 15  # the drafter reports every 10 s, when it drafts
    while (
        "--speculative-config" in server.arguments
        and server.skipped_layers() is None
        and time.monotonic() < deadline
    ):
        _stream(client, server, PROMPTS["maths"], args)
    return Run(texts, repeatable, tokens, seconds, server.counters(), server.skipped_layers())


def _stream(client: openai.OpenAI, server: Server, prompt: str, args: argparse.Namespace) -> tuple[str, int]:
    chunks = client.completions.create(
        model=server.model,
        prompt=prompt,
        max_tokens=args.max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, tokens = "", 0
    for chunk in chunks:
        if chunk.choices:
            text += chunk.choices[0].text
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
    return text, tokens


def _report(console: Console, plain: Run, clasp: Run, args: argparse.Namespace) -> int:
    for domain, text in clasp.texts.items():
        console.rule(domain)
        console.print(PROMPTS[domain], style="dim", markup=False, highlight=False, end="")
        console.print(text.rstrip(), markup=False, highlight=False)
    console.rule("plain vLLM and CLaSp")
    equal = sum(plain.texts[domain] == clasp.texts[domain] for domain in PROMPTS)
    drafts = clasp.counters.get("num_drafts", 0)
    accepted = clasp.counters.get("num_accepted_tokens", 0)
    by_position = (
        [
            f"{value / drafts:.2f}"
            for key, value in clasp.counters.items()
            if key.startswith("num_accepted_tokens_per_pos")
        ]
        if drafts
        else []
    )
    table = Table(show_header=False, box=None)
    table.add_row("greedy outputs equal", f"{equal} of {len(PROMPTS)}")
    table.add_row(
        "mean accepted length", f"{1 + accepted / drafts:.2f} tokens per verification" if drafts else "none"
    )
    table.add_row("accepted per draft, by position", " ".join(by_position))
    table.add_row("layers", clasp.skipped or "no report in the log yet")
    table.add_row("plain vLLM", f"{plain.tokens_per_second:.1f} tokens per second")
    table.add_row("CLaSp", f"{clasp.tokens_per_second:.1f} tokens per second")
    table.add_row("ratio", f"{clasp.tokens_per_second / plain.tokens_per_second:.2f}")
    console.print(table)
    if Path(args.model) == DEMO_MODEL:
        console.print(
            "The demo model is tiny and flatters layer skipping: the ratio says nothing about a real model."
        )
    must_be_equal = Path(args.model) == DEMO_MODEL and args.dtype in (None, "float32")
    return 1 if must_be_equal and equal < len(PROMPTS) else 0


if __name__ == "__main__":
    sys.exit(main())
