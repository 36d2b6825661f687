"""Engines in processes of their own, all alive at once, asked one at a time."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from clasp_vllm.tools.engine import stay_in_process

Answer = dict[str, Any]


def _serve(connection: Connection, model: str, config: object, settings: dict[str, Any], log: str) -> None:
    """Start an engine, then run what is asked of it until the other side closes."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    stay_in_process()
    try:
        from vllm import LLM

        started = time.perf_counter()
        llm = LLM(model, speculative_config=config, disable_log_stats=False, **settings)
        connection.send({"start_seconds": time.perf_counter() - started, **_memory()})
    except BaseException:
        connection.send({"error": traceback.format_exc()})
        return
    while True:
        try:
            command, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send(command(llm, **arguments))
        except BaseException:
            connection.send({"error": traceback.format_exc()})


def _memory() -> dict[str, float]:
    import torch

    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"reserved_gb": torch.cuda.memory_reserved() / 1e9, "device_used_gb": (total - free) / 1e9}


class Engine:
    """A ``vllm.LLM`` in a process of its own, whose output goes to a file.

    Attributes:
        name: which it is.
        alive: whether it can be asked.
    """

    def __init__(
        self, name: str, model: str | Path, config: object, settings: dict[str, Any], log: Path
    ) -> None:
        """Begin to start it: the first ``answer`` says how that went.

        Args:
            config: the speculative configuration; None: plain vLLM.
            settings: further arguments of ``vllm.LLM``.
        """
        self.name = name
        self.alive = True
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        arguments = (other, str(model), config, settings, str(log))
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        other.close()

    def answer(self, until: float = float("inf")) -> Answer:
        """What it says next; {"error": ...} if that is not there at ``until`` (``time.monotonic``)."""
        if not self.alive:
            return {"error": "not running"}
        patience = None if until == float("inf") else max(until - time.monotonic(), 0)
        try:
            if self._connection.poll(patience):
                answer: Answer = self._connection.recv()
                return answer
            error = "no answer in time"
        except (EOFError, OSError):
            error = "its process has died"
        self.stop()
        return {"error": error}

    def ask(self, command: Callable[..., Answer], until: float = float("inf"), **arguments: Any) -> Answer:
        """Run ``command(llm, **arguments)`` in it; the command must be a module's function."""
        if self.alive:
            try:
                self._connection.send((command, arguments))
            except OSError:
                self.stop()
        return self.answer(until)

    def stop(self) -> None:
        """Give back what it holds."""
        self.alive = False
        self._process.kill()
        self._process.join()


def generate(
    llm: Any, prompts: list[Any], tokens: int, temperature: float = 0.0, ignore_eos: bool = True
) -> Answer:
    """Answers to all prompts at once: token ids, the seconds that took, and what speculation counted."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=temperature, max_tokens=tokens, ignore_eos=ignore_eos)
    before = counters(llm)
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "counters": {k: v - before.get(k, 0) for k, v in counters(llm).items()},
    }


def counters(llm: Any) -> dict[str, float]:
    """vLLM's counts of speculation and ours."""
    from vllm.v1.metrics.reader import Counter, Vector

    prefixes = ("vllm:spec_decode_", "vllm:layer_skip_")
    counts: dict[str, float] = {}
    for metric in llm.get_metrics():
        name = metric.name.removeprefix("vllm:")
        if not metric.name.startswith(prefixes):
            continue
        if isinstance(metric, Counter):
            counts[name] = metric.value
        elif isinstance(metric, Vector):
            counts |= {f"{name}[{i}]": value for i, value in enumerate(metric.values)}
    return counts
