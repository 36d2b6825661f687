"""Start real vLLM servers, wait for them, and stop them whatever happens."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


class ServerError(RuntimeError):
    """The server did not come up. The message ends with the end of its log."""


def series_name(sample: Sample) -> str:
    """Of a sample of /metrics: without vLLM's prefix; those by position or layer are name[number]."""
    name = sample.name.removeprefix("vllm:").removesuffix("_total")
    number = sample.labels.get("position", sample.labels.get("layer"))
    return name if number is None else f"{name}[{number}]"


@dataclass
class Server:
    """A running server."""

    port: int
    log: Path
    model: str
    arguments: tuple[str, ...]
    pid: int = 0

    @property
    def url(self) -> str:
        """Base of the OpenAI-compatible API."""
        return f"http://127.0.0.1:{self.port}/v1"

    def metrics(self) -> dict[str, float]:
        """vLLM's counters and gauges on /metrics, by their ``series_name``, summed."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as response:
            text = response.read().decode()
        totals: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            if family.name.startswith("vllm:") and family.type in ("counter", "gauge"):
                for sample in family.samples:
                    if sample.name.endswith("_created"):
                        continue
                    name = series_name(sample)
                    totals[name] = totals.get(name, 0) + sample.value
        return totals

    def counters(self) -> dict[str, float]:
        """Speculation's counters on /metrics; those by position as name[position]."""
        prefix = "spec_decode_"
        return {k.removeprefix(prefix): v for k, v in self.metrics().items() if k.startswith(prefix)}

    def skipped_layers(self) -> str | None:
        """What the drafter's last report in the log says of the layers."""
        reports = re.findall(
            r"Layer skipping: .*?(mean layers skipped: .*)", self.log.read_text(errors="replace")
        )
        return reports[-1] if reports else None


def free_port(preferred: int) -> int:
    """``preferred`` if nothing listens there, else another."""
    for port in (preferred, 0):
        with socket.socket() as candidate:
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                candidate.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(candidate.getsockname()[1])
    raise ServerError("no free port")


@contextmanager
def serve(
    model: str | Path,
    *arguments: str,
    log: Path,
    port: int = 8000,
    timeout_s: float = 1800,
    on_wait: Callable[[float], None] = lambda seconds: None,
) -> Iterator[Server]:
    """``vllm serve MODEL ARGUMENTS``, ready when entered and stopped when left.

    Args:
        model: name or path.
        log: file for the server's output.
        port: the port to try first.
        timeout_s: how long to wait for it to be ready.
        on_wait: called with the seconds waited, about once a second.

    Raises:
        ServerError: it ended or was not ready in time.
    """
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model)]
    server = Server(free_port(port), log, str(model), arguments)
    command += ["--host", "127.0.0.1", "--port", str(server.port), *arguments]
    with log.open("w") as output:
        # A session of its own, so that all its processes can be stopped together.
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | _environment(model),
        )
    server.pid = process.pid
    try:
        _wait(server, process, timeout_s, on_wait)
        yield server
    finally:
        _stop(process)


def _environment(model: str | Path) -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "1"} if Path(model).is_dir() else {}


def _wait(
    server: Server, process: subprocess.Popen[bytes], timeout_s: float, on_wait: Callable[[float], None]
) -> None:
    started = time.monotonic()
    while True:
        waited = time.monotonic() - started
        if process.poll() is not None or waited > timeout_s:
            why = (
                f"ended with status {process.returncode}"
                if process.returncode is not None
                else "is not ready"
            )
            tail = "\n".join(server.log.read_text(errors="replace").splitlines()[-15:])
            raise ServerError(f"the server {why} after {waited:.0f} s; the end of {server.log}:\n{tail}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            on_wait(waited)
            time.sleep(1)


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number, patience in ((signal.SIGINT, 20), (signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    with suppress(ProcessLookupError):  # children that outlived it
        os.killpg(process.pid, signal.SIGKILL)
