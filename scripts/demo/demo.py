"""Serve a model with plain vLLM and with CLaSp, ask both the same over HTTP in turn, and compare.

Both servers run at the same time; never more than one is asked. Greedy outputs must be equal; on a GPU or
in bfloat16 two runs of plain vLLM may differ too, so the demo's own models are run in float32 unless --dtype
says otherwise.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import openai
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, track
from rich.table import Table

from clasp_vllm.bench.report import spread
from clasp_vllm.tools.assistant import ModelError, assistant, source_of
from clasp_vllm.tools.options import number, split_arguments
from clasp_vllm.tools.servers import Server, ServerError, serve

PLAIN, CLASP = "plain vLLM", "CLaSp"
ROOT = Path(__file__).parents[2]
TINY_MODEL = Path(__file__).resolve().with_name("model")
QUESTIONS = {
    "science": "Why is the sky blue? Answer in two sentences.",
    "geography": "What is the capital of France, and what is it known for?",
    "writing": "Write a short poem about the sea.",
    "code": "Write a Python function that returns the sum of a list of numbers.",
    "advice": "Give me three tips for sleeping well.",
}
# What the tiny model goes on with: it is no assistant.
BEGINNINGS = {
    "maths": "Question: Natalia sold clips to 48 of her friends in April, and then she sold half as many "
    "clips in May. How many clips did Natalia sell altogether in April and May?\nAnswer:",
    "code": 'def parse(self, text):\n    """Parse the text."""\n',
    "prose": '"My dear Holmes," said I,',
    "SQL": "Question: List the name and age of the top 5 users by score.\nSQL:",
    "JSON": "Text: Eve is a 64 year old baker who lives in Delhi.\nJSON:",
}


@dataclass(frozen=True)
class Model:
    """What is served.

    Attributes:
        name: name or path, for vLLM.
        source: where it comes from, for people.
        ours: it is one of the demo's own, whose outputs must be equal in float32.
        tiny: it is the one in this repository, which is no assistant.
    """

    name: str
    source: str
    ours: bool = False
    tiny: bool = False


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    seconds: float
    reason: str | None  # "stop": the model ended it, "length": --max-tokens did


@dataclass
class Client:
    """Asks a server, greedily."""

    name: str
    server: Server
    max_tokens: int
    chat: bool
    rounds: list[list[Answer]] = field(default_factory=list)  # the first warms up

    def __post_init__(self) -> None:
        self._api = openai.OpenAI(base_url=self.server.url, api_key="none", timeout=600)

    def ask(self, prompt: str, show: Callable[[str], None] = lambda text: None) -> Answer:
        """The answer, which is also shown piece by piece."""
        options = {
            "model": self.server.model,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        started, text, tokens, reason = time.perf_counter(), "", 0, None
        if self.chat:
            chunks = self._api.chat.completions.create(
                messages=[{"role": "user", "content": prompt}], **options
            )
        else:
            chunks = self._api.completions.create(prompt=prompt, **options)
        for chunk in chunks:
            for choice in chunk.choices:
                piece = (choice.delta.content if self.chat else choice.text) or ""
                reason = choice.finish_reason or reason
                text += piece
                show(piece)
            if chunk.usage:
                tokens = chunk.usage.completion_tokens
        return Answer(text, tokens, time.perf_counter() - started, reason)

    def speeds(self) -> list[float]:
        """Tokens per second of each timed round."""
        return [
            sum(a.tokens for a in answers) / sum(a.seconds for a in answers) for answers in self.rounds[1:]
        ]


def main() -> int:
    args = _arguments()
    console = Console()
    logs = Path(args.logs or tempfile.mkdtemp(prefix="clasp-demo-"))
    logs.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        model = _model(console, args)
        console.print(f"model: {model.name}\nsource: {model.source}", markup=False, highlight=False)
        arguments = _server_arguments(args, model)
        prompts, chat = BEGINNINGS if model.tiny else QUESTIONS, not model.tiny
        with ExitStack() as stack:
            plain, clasp = _start(console, stack, model, arguments, args, logs)
            if chat and not _can_chat(plain):
                console.print("It has no chat template: it gets the questions as text to go on with.")
                prompts = {name: f"Question: {text}\nAnswer:" for name, text in QUESTIONS.items()}
                chat = False
            clients = [
                Client(PLAIN, plain, args.max_tokens, chat),
                Client(CLASP, clasp, args.max_tokens, chat),
            ]
            _show(console, clients, prompts)
            _measure(console, clients, prompts, args.repeats)
            _wait_for_report(clients[1], prompts)
            return _report(console, clients, model, args)
    except ServerError as error:
        console.print(str(error), style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; the servers are stopped.")
        return 130


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="All further arguments go to both servers, after `--`. On a GPU each gets 0.45 of its memory "
        "unless --gpu-memory-utilization is among them.",
    )
    parser.add_argument(
        "model", nargs="?", help="name or path (default: SmolLM2-135M-Instruct, fetched once: 93 MB)"
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="the tiny model in this repository, for a quick look: no assistant",
    )
    parser.add_argument(
        "--config", default=str(ROOT / "configs" / "clasp.yaml"), help="the speculative configuration"
    )
    parser.add_argument("--dtype", help="float32 for the demo's own models, else vLLM's choice")
    parser.add_argument("--port", type=int, default=8000, help="port to try first")
    parser.add_argument("--max-tokens", type=number(1), default=96, help="tokens per answer")
    parser.add_argument("--repeats", type=number(1), default=3, help="timed rounds over the questions")
    parser.add_argument("--logs", help="folder for the servers' logs")
    own_arguments, server_arguments = split_arguments(sys.argv[1:])
    args = parser.parse_args(own_arguments, argparse.Namespace(server_arguments=server_arguments))
    if args.tiny and args.model:
        parser.error(f"--tiny and model {args.model}: only one can be served")
    return args


def _model(console: Console, args: argparse.Namespace) -> Model:
    """The model asked for; the tiny one where the assistant cannot be had."""
    tiny = Model(str(TINY_MODEL), "this repository: tiny, no assistant", ours=True, tiny=True)
    if args.tiny or (args.model and Path(args.model).resolve() == TINY_MODEL):
        return tiny
    if args.model:
        where = "a folder" if Path(args.model).is_dir() else "the Hugging Face hub"
        return Model(args.model, source_of(args.model) or where)
    try:
        folder = assistant()
    except ModelError as error:
        console.print(f"{error}.\nGoing on with the tiny model.", style="yellow", markup=False)
        return tiny
    return Model(str(folder), str(source_of(folder)), ours=True)


def _server_arguments(args: argparse.Namespace, model: Model) -> list[str]:
    import torch

    gpu, arguments = torch.cuda.is_available(), []
    if model.ours:
        arguments += ["--max-model-len", "1024", "--max-num-seqs", "8"]
        arguments += ["--kv-cache-memory-bytes", str(1 << 30)]
        if not gpu:  # compiling takes minutes, and longer than all answers together
            arguments.append("--enforce-eager")
    if gpu:  # both servers share it
        arguments += ["--gpu-memory-utilization", "0.45"]
    if args.dtype or model.ours:
        arguments += ["--dtype", args.dtype or "float32"]
    return [*arguments, *args.server_arguments]  # the last of two counts


def _start(
    console: Console,
    stack: ExitStack,
    model: Model,
    arguments: list[str],
    args: argparse.Namespace,
    logs: Path,
) -> list[Server]:
    """Both servers, which start at the same time; leaving ``stack`` stops them."""
    stop = threading.Event()

    def wait(seconds: float) -> None:
        if stop.is_set():
            raise ServerError("the other server did not start")

    def start(name: str, server_arguments: list[str], port: int) -> Server:
        log = logs / f"{name.split()[0].lower()}.log"
        task = progress.add_task(f"{name}: starting the server (log: {log})", total=1)
        server = stack.enter_context(serve(model.name, *server_arguments, log=log, port=port, on_wait=wait))
        progress.update(task, description=f"{name}: serving on port {server.port}", completed=1)
        return server

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(2) as pool:
        futures = [
            pool.submit(start, PLAIN, arguments, args.port),
            pool.submit(start, CLASP, [*arguments, "--speculative-config", args.config], args.port + 1),
        ]
        try:
            for future in as_completed(futures):  # the first failure is the cause
                future.result()
        except BaseException:
            stop.set()
            raise
        return [future.result() for future in futures]


def _can_chat(server: Server) -> bool:
    try:
        Client("", server, 1, chat=True).ask("Hello")
    except openai.BadRequestError as error:
        if "chat template" not in str(error).lower():
            raise
        return False
    return True


def _in_turn(clients: list[Client], turn: int) -> list[Client]:
    """Plain vLLM first in even turns, CLaSp first in odd ones."""
    return clients[::-1] if turn % 2 else clients


def _show(console: Console, clients: list[Client], prompts: dict[str, str]) -> None:
    """Ask everything once and show the answers as they come."""

    def write(text: str) -> None:
        console.print(text, end="", markup=False, highlight=False, soft_wrap=True)

    for client in clients:
        client.rounds.append([])
    for turn, (name, prompt) in enumerate(prompts.items()):
        first, second = _in_turn(clients, turn)
        console.rule(f"{name}: {first.name} answers")
        console.print(prompt, style="dim", markup=False, highlight=False, end="\n\n" if first.chat else "")
        answer = first.ask(prompt, write)
        write("\n" if answer.reason == "stop" else " [...]\n")
        with console.status(f"the same for {second.name}"):
            other = second.ask(prompt)
        if other.text == answer.text:
            console.print(f"\n{second.name} answers the same.", style="green")
        else:
            console.print(f"\n{second.name} answers otherwise:", style="red")
            write(f"{other.text}\n")
        first.rounds[0].append(answer)
        second.rounds[0].append(other)


def _measure(console: Console, clients: list[Client], prompts: dict[str, str], repeats: int) -> None:
    """Ask everything again and again."""
    for repeat in track(range(repeats), "measuring", console=console, transient=True):
        for client in clients:
            client.rounds.append([])
        for turn, prompt in enumerate(prompts.values()):
            for client in _in_turn(clients, turn + repeat):
                client.rounds[-1].append(client.ask(prompt))


def _wait_for_report(client: Client, prompts: dict[str, str]) -> None:
    """Until the log says which layers were skipped: the drafter reports every 10 s, when it drafts."""
    deadline = time.monotonic() + 15
    while client.server.skipped_layers() is None and time.monotonic() < deadline:
        client.ask(next(iter(prompts.values())))


def _report(console: Console, clients: list[Client], model: Model, args: argparse.Namespace) -> int:
    console.rule("plain vLLM and CLaSp")
    plain, clasp = clients
    pairs = [
        pair for rounds in zip(plain.rounds, clasp.rounds, strict=True) for pair in zip(*rounds, strict=True)
    ]
    equal = sum((a.text, a.tokens) == (b.text, b.tokens) for a, b in pairs)
    counters = clasp.server.counters()
    drafts = counters.get("num_drafts", 0)
    accepted = counters.get("num_accepted_tokens", 0)
    by_position = [
        f"{value / drafts:.2f}"
        for key, value in counters.items()
        if key.startswith("num_accepted_tokens_per_pos") and drafts
    ]
    ratios = [b / a for a, b in zip(plain.speeds(), clasp.speeds(), strict=True)]
    table = Table(show_header=False, box=None)
    table.add_row("model", model.name)
    table.add_row("source", model.source)
    table.add_row("greedy answers equal", f"{equal} of {len(pairs)}")
    table.add_row(
        "mean accepted length", f"{1 + accepted / drafts:.2f} tokens per verification" if drafts else "none"
    )
    table.add_row("accepted per draft, by position", " ".join(by_position))
    table.add_row("layers", clasp.server.skipped_layers() or "no report in the log yet")
    for client in clients:
        table.add_row(client.name, f"{statistics.median(client.speeds()):.1f} tokens per second")
    table.add_row("ratio", f"{spread(ratios)}, {args.repeats} rounds over the questions, asked in turn")
    console.print(table)
    if model.tiny:
        console.print("The tiny model flatters layer skipping: the ratio says nothing about a real model.")
    must_be_equal = model.ours and args.dtype in (None, "float32")
    return 1 if must_be_equal and equal < len(pairs) else 0


if __name__ == "__main__":
    sys.exit(main())
