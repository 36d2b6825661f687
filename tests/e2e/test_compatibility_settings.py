"""Settings of a server that share its steps out otherwise, and all kinds of requests that need a setting."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from engines import PERSON, PROMPTS
from pairs import Side, pair

from clasp_vllm.tools.assistant import assistant

pytestmark = pytest.mark.slow

# Whether drafts pay is another question: these are always made.
ALWAYS = {"method": "clasp", "adaptive": ["layers", "length", "exit"], "num_speculative_tokens": 5}
SETTINGS = (
    # Six requests with drafts of five tokens would be 36.
    *("--max-num-seqs", "6", "--max-num-batched-tokens", "32", "--long-prefill-token-threshold", "16"),
    *("--scheduling-policy", "priority", "--enable-prompt-embeds"),
    *("--structured-outputs-config", '{"backend": "guidance", "disable_any_whitespace": true}'),
)
PENS = r"(\d{1,3} pens, ){2,4}done"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("servers")
    with pair(assistant("pypi"), *SETTINGS, config=ALWAYS, folder=folder) as sides:
        yield sides


def embeddings(side: Side, prompt: str) -> str:
    """What the model makes of the prompt's tokens, as vLLM takes it."""
    import torch
    from safetensors import safe_open

    tokens = side.post("/tokenize", {"model": side.server.model, "prompt": prompt})["tokens"]
    with safe_open(Path(side.server.model) / "model.safetensors", "pt") as weights:
        vectors = weights.get_tensor("model.embed_tokens.weight")[tokens].float()
    file = io.BytesIO()
    torch.save(vectors, file)
    return base64.b64encode(file.getvalue()).decode()


Ask = Callable[[Side], str]


def text(prompt: str, priority: int = 0) -> Ask:
    return lambda side: side.complete(prompt, {"priority": priority}).choices[0].text


def streamed(prompt: str, priority: int) -> Ask:
    def ask(side: Side) -> str:
        chunks = side.complete(prompt, {"priority": priority}, stream=True)
        return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)

    return ask


def vectors(prompt: str) -> Ask:
    """Without a prompt beside them, which openai's client would send."""

    def ask(side: Side) -> str:
        body = {"model": side.server.model, "temperature": 0, "max_tokens": 48}
        answer = side.post("/v1/completions", body | {"prompt_embeds": embeddings(side, prompt)})
        return answer["choices"][0]["text"]

    return ask


def structured(question: str, **constraint: Any) -> Ask:
    messages = [{"role": "user", "content": question}]
    extra = {"structured_outputs": constraint}
    return lambda side: side.chat(messages, extra, max_tokens=60).choices[0].message.content


def schema(question: str) -> Ask:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    messages = [{"role": "user", "content": question}]
    return lambda side: side.chat(messages, response_format=form, max_tokens=60).choices[0].message.content


LONG = " ".join(PROMPTS[:4])
REQUESTS = {
    "long": text(LONG, 2),
    "long, streamed": streamed(LONG[50:], 1),
    "long, as vectors": vectors(LONG),
    **{f"text {i}": text(PROMPTS[i], 5 - i) for i in range(4)},
    **{f"text {i}, streamed": streamed(PROMPTS[i], i) for i in range(4, 7)},
    **{f"text {i}, as vectors": vectors(PROMPTS[i]) for i in range(3)},
    **{f"JSON {name}": schema(f"As JSON: {name} is a baker of 64.") for name in ("Eve", "Leo", "Ann", "Tom")},
    **{f"regex {n}": structured(f"How many pens are in {n} boxes?", regex=PENS) for n in (3, 5, 7, 9)},
    **{
        f"choice {city}": structured(f"Is {city} far?", choice=["It is far.", "It is near."])
        for city in ("Oslo", "Rome", "Lima", "Bern")
    },
}


def test_one_by_one(both):
    plain, ours = ([ask(side) for ask in REQUESTS.values()] for side in both)
    assert dict(zip(REQUESTS, ours, strict=True)) == dict(zip(REQUESTS, plain, strict=True))
    assert all(ours)
    by_name = dict(zip(REQUESTS, ours, strict=True))
    for name in ("long", *(f"text {i}" for i in range(3))):
        assert by_name[f"{name}, as vectors"] == by_name[name]
    for name, answer in by_name.items():
        if name.startswith("JSON"):
            assert json.loads(answer).keys() == {"name", "age"}
        if name.startswith("regex"):
            assert re.fullmatch(PENS, answer)
        if name.startswith("choice"):
            assert answer in ("It is far.", "It is near.")


def test_all_at_once(both):
    answers = []
    for side in both:
        with ThreadPoolExecutor(len(REQUESTS)) as pool:
            answers.append(
                dict(zip(REQUESTS, pool.map(lambda ask, of=side: ask(of), REQUESTS.values()), strict=True))
            )
    plain, ours = answers
    assert ours == plain
    counters = both[1].server.metrics()
    assert counters["spec_decode_num_accepted_tokens"] > 0
    assert counters["layer_skip_failures"] == 0
    log = both[1].server.log.read_text()
    assert "Failed to advance FSM" not in log
    assert "LLMatcher error" not in log


def test_refused_as_by_plain_vllm(both):
    """A priority that is no number of 64 bits, and what is no tensor."""
    bodies = [{"prompt": "a", "priority": 2**80}, {"prompt_embeds": "AAAA"}]
    for body in bodies:
        replies = [
            side.http.post("/v1/completions", json={"model": side.server.model, **body}) for side in both
        ]
        assert replies[0].is_client_error
        assert replies[0].status_code == replies[1].status_code
        assert replies[0].text == replies[1].text
