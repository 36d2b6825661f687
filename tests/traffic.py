"""Random HTTP traffic: requests of all shapes from real openai clients, some of which go away half-way."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import openai
from engines import PROMPTS


@dataclass
class Traffic:
    """What became of the requests."""

    texts: dict[int, set[str]] = field(default_factory=dict)  # of greedy requests, by shape
    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    def add(self, other: Traffic) -> None:
        """Further requests of the same shapes."""
        self.counts += other.counts
        self.errors += other.errors
        for index, texts in other.texts.items():
            self.texts.setdefault(index, set()).update(texts)


def shapes(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Arguments of ``completions.create`` for ``count`` random requests; two thirds are greedy."""
    rng = random.Random(seed)
    requests = []
    for _ in range(count):
        text = " ".join(rng.sample(PROMPTS, rng.randint(1, 4)))
        start = rng.randrange(1 + len(text) // 2)
        size = rng.choice((1, 20, 150, 600))
        shape: dict[str, Any] = {
            "prompt": text[start : start + size] or text,
            "max_tokens": rng.choice((1, 3, 17, 40, 90, 150)),
            "temperature": 0.0,
            "extra_body": {"ignore_eos": rng.random() < 0.7},
        }
        if rng.random() < 0.33:
            shape |= {"temperature": rng.choice((0.5, 1.0)), "top_p": rng.choice((0.8, 1.0)), "n": 2}
        if rng.random() < 0.2:
            shape["stop"] = ["\n\n", "Q"]
        if rng.random() < 0.2:
            shape["logprobs"] = 2
        if rng.random() < 0.2:
            shape["frequency_penalty"] = 0.5
        requests.append(shape)
    return requests


async def _one(
    client: openai.AsyncOpenAI, model: str, index: int, shape: dict, leaves: bool, traffic: Traffic
) -> None:
    rng = random.Random(index)
    try:
        if not leaves and rng.random() < 0.5:
            response = await client.completions.create(model=model, **shape)
            text = response.choices[0].text
        else:
            stream = await client.completions.create(model=model, stream=True, **shape)
            patience, text = rng.randint(1, 40), ""
            async with stream:
                async for chunk in stream:
                    if chunk.choices and chunk.choices[0].index == 0:
                        text += chunk.choices[0].text
                    patience -= 1
                    if leaves and patience == 0:
                        traffic.counts["left"] += 1
                        return
    except openai.OpenAIError as error:
        traffic.errors.append(repr(error))
        return
    traffic.counts["answered"] += 1
    if shape["temperature"] == 0:
        traffic.texts.setdefault(index, set()).add(text)


async def _drive(
    url: str, model: str, requests: list[dict], concurrency: int, seconds: float, leaving: float
) -> Traffic:
    traffic, rng = Traffic(), random.Random(1)
    until = time.monotonic() + seconds
    order = iter(range(10**9))
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:

        async def keep_asking() -> None:
            while (number := next(order)) < len(requests) or time.monotonic() < until:
                index = number % len(requests)
                await _one(client, model, index, requests[index], rng.random() < leaving, traffic)

        await asyncio.gather(*(keep_asking() for _ in range(concurrency)))
    return traffic


def drive(
    url: str,
    model: str,
    requests: list[dict],
    concurrency: int = 200,
    seconds: float = 0.0,
    leaving: float = 0.25,
) -> Traffic:
    """Send every request at least once, then again in turn until ``seconds`` are over.

    ``leaving``: the share of clients that go away in the middle of a stream.
    """
    return asyncio.run(_drive(url, model, requests, concurrency, seconds, leaving))
