"""Plain vLLM and our method, both behind HTTP, for tests that compare their answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

from clasp_vllm.tools.servers import Server, serve

ARGUMENTS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "512")
ARGUMENTS += ("--kv-cache-memory-bytes", "536870912")


@dataclass
class Side:
    """A server and its clients: ``http`` is for what openai's lacks."""

    server: Server
    client: openai.OpenAI
    http: httpx.Client

    def complete(self, prompt: Any, extra: dict[str, Any] | None = None, **settings: Any) -> Any:
        """Of openai's client, greedy unless told otherwise. ``extra``: keys that only vLLM knows."""
        settings = {"model": self.server.model, "temperature": 0, "max_tokens": 48} | settings
        return self.client.completions.create(prompt=prompt, extra_body=extra, **settings)

    def chat(self, messages: Any, extra: dict[str, Any] | None = None, **settings: Any) -> Any:
        """Likewise, of a chat."""
        settings = {"model": self.server.model, "temperature": 0, "max_tokens": 48} | settings
        return self.client.chat.completions.create(messages=messages, extra_body=extra, **settings)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """What a path outside of /v1 answers, which must be well."""
        response = self.http.post(path, json=body)
        assert response.is_success, f"{path}: {response.status_code} {response.text}"
        return response.json() if response.content else None

    def wait_for(self, gauge: str, value: int) -> None:
        """Until a gauge is there, which lags behind the answers."""
        for _ in range(500):
            if self.server.metrics()[gauge] == value:
                return
            time.sleep(0.02)
        raise AssertionError(f"{gauge} does not become {value}")

    def during(
        self, prompts: Sequence[Any], action: Callable[[Side], None], tokens: int = 160
    ) -> list[tuple[str, list[int], str | None]]:
        """Run ``action`` while all ``prompts`` are being answered: each one's text, token ids and end."""
        words = {"max_tokens": tokens, "stream": True}
        extra = {"ignore_eos": True, "return_token_ids": True}
        streams = [self.complete(prompt, extra, **words) for prompt in prompts]
        chunks = [[next(iter(stream))] for stream in streams]
        self.wait_for("num_requests_running", len(prompts))
        action(self)
        answers = []
        for stream, first in zip(streams, chunks, strict=True):
            choices = [chunk.choices[0] for chunk in [*first, *stream] if chunk.choices]
            ids = [token for choice in choices for token in choice.token_ids or []]
            text = "".join(choice.text for choice in choices)
            answers.append((text, ids, choices[-1].finish_reason))
        return answers


@contextmanager
def serving(model: str | Path, *arguments: str, log: Path) -> Iterator[Side]:
    """A server and its clients."""
    with serve(model, *ARGUMENTS, *arguments, log=log, port=8150) as server:
        root = server.url.removesuffix("/v1")
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=300)
        with client, httpx.Client(base_url=root, timeout=300) as http:
            yield Side(server, client, http)


@contextmanager
def pair(
    model: str | Path, *arguments: str, config: dict[str, Any], folder: Path
) -> Iterator[tuple[Side, Side]]:
    """Plain vLLM, and our method with ``config``."""
    ours = ("--speculative-config", json.dumps(config))
    with (
        serving(model, *arguments, log=folder / "plain.log") as plain,
        serving(model, *arguments, *ours, log=folder / "ours.log") as clasp,
    ):
        yield plain, clasp


def close(a: Any, b: Any) -> bool:
    """Equal but for rounding, in numbers of whatever nesting."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(close, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) < 1e-3
    return bool(a == b)
