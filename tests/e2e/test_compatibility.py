"""What plain vLLM serves over HTTP is served alike, and what it refuses is refused alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from engines import PROMPTS
from pairs import Side, close, pair, serving

from clasp_vllm.tools.assistant import assistant

pytestmark = pytest.mark.slow

# Whether drafts pay is another question: these are always made.
ALWAYS = {"method": "clasp", "adaptive": ["layers", "length", "exit"]}
INT8 = {"method": "clasp", "adaptive": False, "num_skipped_layers": 3, "draft_weights": "int8"}
QUESTION = {"role": "user", "content": "Write two sentences about a lost cat."}
LIKELIEST = {"top_k": 1}  # for vLLM refuses several greedy answers
BEGUN = [QUESTION, {"role": "assistant", "content": "The cat of our neighbour"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        yield tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="module")
def both(folder) -> Iterator[tuple[Side, Side]]:
    with pair(assistant("pypi"), "--max-num-seqs", "16", config=ALWAYS, folder=folder) as sides:
        yield sides


@pytest.fixture(scope="module")
def quantised(folder) -> Iterator[Side]:
    arguments = ("--max-num-seqs", "16", "--speculative-config", json.dumps(INT8))
    with serving(assistant("pypi"), *arguments, log=folder / "int8.log") as side:
        yield side


def echo(side: Side) -> Any:
    choice = side.complete(PROMPTS[9], max_tokens=16, echo=True, logprobs=2).choices[0]
    assert choice.text.startswith(PROMPTS[9])
    of = choice.logprobs
    assert of.token_logprobs[0] is None
    assert len(of.tokens) > 16
    return choice.text, of.tokens, of.token_logprobs[1:], of.top_logprobs[1:], of.text_offset


def echo_alone(side: Side) -> Any:
    choice = side.complete(PROMPTS[6], max_tokens=0, echo=True).choices[0]
    assert choice.text == PROMPTS[6]
    return choice.text


def prompt_logprobs(side: Side) -> Any:
    choice = side.complete(PROMPTS[8], {"prompt_logprobs": 2}, max_tokens=16, logprobs=1).choices[0]
    first, *rest = choice.prompt_logprobs
    assert first is None
    values = [{token: value["logprob"] for token, value in position.items()} for position in rest]
    assert all(len(position) >= 2 for position in values)
    return choice.text, values, choice.logprobs.token_logprobs


def continued(side: Side) -> Any:
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    answer = side.chat(BEGUN, extra).choices[0].message.content
    anew = side.chat(BEGUN).choices[0].message.content
    assert answer
    assert answer != anew
    return answer, anew


def continued_and_echoed(side: Side) -> Any:
    extra = {"continue_final_message": True, "add_generation_prompt": False, "echo": True}
    answer = side.chat(BEGUN, extra).choices[0].message.content
    assert answer.startswith(BEGUN[-1]["content"])
    return answer


def responses(side: Side) -> Any:
    words = {"model": side.server.model, "input": QUESTION["content"], "temperature": 0}
    whole = side.client.responses.create(**words, max_output_tokens=48)
    events = list(side.client.responses.create(**words, max_output_tokens=48, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert whole.output_text
    assert "".join(deltas) == whole.output_text
    return whole.output_text, whole.status, whole.usage.output_tokens, events[-1].type


def several(side: Side) -> Any:
    """Two answers to each of three prompts, which end at lengths of their own."""
    response = side.complete(list(PROMPTS[:3]), LIKELIEST, n=2, temperature=1, max_tokens=60, stop=["."])
    texts = [(choice.index, choice.text, choice.finish_reason) for choice in response.choices]
    assert len(texts) == 6
    assert len({len(text) for _, text, _ in texts}) > 1
    return texts, response.usage.completion_tokens


def several_drawn(side: Side) -> Any:
    """Without drafts they are those of the seed."""
    extra = {"vllm_xargs": {"layer_skip": False}} if "--speculative-config" in side.server.arguments else {}
    words = {"n": 4, "seed": 5, "temperature": 1.0, "max_tokens": 60, "stop": ["."]}
    response = side.complete(PROMPTS[9], extra, **words)
    texts = [choice.text for choice in sorted(response.choices, key=lambda choice: choice.index)]
    assert len(set(texts)) == 4
    assert len({len(text) for text in texts}) > 1
    return texts


def streamed_several(side: Side) -> Any:
    texts = ["", "", ""]
    words = {"n": 3, "temperature": 1, "stream": True, "stream_options": {"include_usage": True}}
    for chunk in side.complete(PROMPTS[6], LIKELIEST, **words):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert all(texts)
    return texts, chunk.usage.completion_tokens


ROWS = (echo, echo_alone, prompt_logprobs, continued, continued_and_echoed, responses, several)
ROWS += (several_drawn, streamed_several)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.__name__)
def test_answers_are_plain_vllms(both, row):
    plain, ours = map(row, both)
    assert close(ours, plain)


def test_at_once_too(both):
    """All rows at the same time on each server."""
    answers = []
    for side in both:
        with ThreadPoolExecutor(len(ROWS)) as pool:
            answers.append(list(pool.map(lambda row, side=side: row(side), ROWS)))
    plain, ours = answers
    for row, theirs, mine in zip(ROWS, plain, ours, strict=True):
        assert close(mine, theirs), row.__name__


REFUSED: dict[str, tuple[str, dict]] = {
    "embeddings": ("/v1/embeddings", {"input": "a"}),
    "pooling": ("/pooling", {"input": "a"}),
    "classification": ("/classify", {"input": "a"}),
    "scores": ("/score", {"text_1": "a", "text_2": "b"}),
    "ranks": ("/v1/rerank", {"query": "a", "documents": ["b"]}),
    "streamed prompt logprobs": ("/v1/completions", {"prompt": "a", "prompt_logprobs": 1, "stream": True}),
    "continuing what is not begun": (
        "/v1/chat/completions",
        {"messages": [QUESTION], "continue_final_message": True},
    ),
    "several greedy answers": ("/v1/completions", {"prompt": "a", "n": 2, "temperature": 0}),
    "prompt embeddings without the option": ("/v1/completions", {"prompt_embeds": "AAAA"}),
    "weights from elsewhere": ("/start_weight_update", {}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_as_by_plain_vllm(both, what):
    path, body = REFUSED[what]
    replies = [side.http.post(path, json={"model": side.server.model, **body}) for side in both]
    assert replies[0].is_error
    assert replies[0].status_code == replies[1].status_code
    assert replies[0].text == replies[1].text


def reset(side: Side) -> None:
    """Where requests hold blocks, nothing is reset."""
    assert side.post("/reset_prefix_cache") == {"success": False}


def reset_and_preempt(side: Side) -> None:
    assert side.post("/reset_prefix_cache?reset_running_requests=true") == {"success": True}


def pausing(mode: str) -> Any:
    def pause(side: Side) -> None:
        side.post(f"/pause?mode={mode}")
        assert side.http.get("/is_paused").json() == {"is_paused": True}
        side.post("/resume")

    return pause


def reload(side: Side) -> None:
    side.post("/collective_rpc", {"method": "reload_weights"})


def asleep(side: Side) -> bool:
    return side.http.get("/is_sleeping").json()["is_sleeping"]


def sleeping(level: int, mode: str = "keep") -> Any:
    def sleep(side: Side) -> None:
        side.post(f"/sleep?level={level}&mode={mode}")
        assert asleep(side)
        assert side.post("/wake_up")["status"] == "awake"

    return sleep


def sleep_deeply(side: Side) -> None:
    """As after level 2 on a GPU: weights are gone and have to be loaded before there is a cache again."""
    side.post("/sleep?level=2&mode=keep")
    assert side.post("/wake_up?tags=weights")["status"] == "sleeping"
    reload(side)
    assert asleep(side)
    assert side.post("/wake_up?tags=kv_cache")["status"] == "awake"


ACTIONS = {
    "a reset that fails": reset,
    "a reset that preempts": reset_and_preempt,
    "a pause": pausing("keep"),
    "a pause that waits": pausing("wait"),
    "the weights loaded again": reload,
    "sleep": sleeping(0),
    "sleep 1": sleeping(1),
}
ASKED = PROMPTS[:4]


@pytest.fixture(scope="module")
def undisturbed(both) -> list:
    plain, _ = both
    return plain.during(ASKED, lambda side: None)


@pytest.mark.parametrize("what", ACTIONS)
def test_what_happens_to_running_requests_leaves_their_answers(both, undisturbed, what):
    """On a CPU vLLM keeps all memory while it sleeps; the rest happens as on a GPU."""
    _, ours = both
    drafted = ours.server.counters()["num_drafts"]
    assert ours.during(ASKED, ACTIONS[what]) == undisturbed
    assert ours.server.counters()["num_drafts"] > drafted


@pytest.mark.parametrize("action", [pausing("abort"), sleeping(2, "abort")], ids=["pause", "sleep"])
def test_requests_that_are_aborted(both, undisturbed, action):
    _, ours = both
    for (text, ids, reason), (whole, all_ids, _) in zip(ours.during(ASKED, action), undisturbed, strict=True):
        assert reason == "abort"
        assert 0 < len(ids) < len(all_ids)
        assert all_ids[: len(ids)] == ids
        assert whole.startswith(text)
    assert ours.during(ASKED, lambda side: None) == undisturbed


def acceptance(side: Side, action: Any = lambda side: None) -> tuple[list, float]:
    """Answers while ``action`` happens, and the share of draft tokens accepted."""
    before = side.server.counters()
    answers = side.during(ASKED, action)
    after = side.server.counters()
    names = ("num_draft_tokens", "num_accepted_tokens")
    drafted, accepted = (after[name] - before.get(name, 0) for name in names)
    return answers, accepted / drafted


@pytest.fixture(params=["target", "int8"])
def ours(request) -> Side:
    """By the weights of its drafts."""
    if request.param == "int8":
        return request.getfixturevalue("quantised")
    return request.getfixturevalue("both")[1]


def test_level_2_leaves_answers_and_acceptance(ours, undisturbed):
    """vLLM issue 52479: every draft was rejected afterwards."""
    answers, before = acceptance(ours)
    assert answers == undisturbed
    answers, _ = acceptance(ours, sleep_deeply)
    assert answers == undisturbed
    answers, after = acceptance(ours)
    assert answers == undisturbed
    assert after > before / 2 > 0.1
    assert ours.server.metrics()["layer_skip_failures"] == 0


@pytest.fixture(scope="module")
def other(folder) -> str:
    """The same model with each MLP's output changed a little: it says something else."""
    import torch
    from safetensors.torch import load_file, save_file

    target = folder / "other"
    shutil.copytree(assistant("pypi"), target)
    torch.manual_seed(0)
    weights = load_file(target / "model.safetensors")
    for name, weight in weights.items():
        if "down_proj" in name:
            weight *= 1 + 0.2 * torch.randn(weight.shape[0], 1)
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return str(target)


def load(side: Side, path: str) -> None:
    side.post("/pause?mode=keep")
    side.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}})
    assert side.post("/reset_prefix_cache?reset_running_requests=true") == {"success": True}
    side.post("/resume")


def test_other_weights_while_requests_run(ours, both, other, undisturbed):
    """From the change on answers are what plain vLLM says by the new weights, given what was said so far."""
    plain, _ = both
    changed, accepted = acceptance(ours, lambda side: load(side, other))
    load(plain, other)
    for prompt, (_, ids, _), (_, old, _) in zip(ASKED, changed, undisturbed, strict=True):
        same = next(i for i, pair in enumerate(zip(ids, old, strict=True)) if pair[0] != pair[1])
        tokens = plain.post("/tokenize", {"model": plain.server.model, "prompt": prompt})["tokens"]
        extra = {"ignore_eos": True, "return_token_ids": True}
        rest = plain.complete(tokens + ids[:same], extra, max_tokens=len(ids) - same).choices[0]
        assert rest.token_ids == ids[same:]
    assert accepted > 0.1
    for side in (plain, ours):
        load(side, str(assistant("pypi")))
    assert ours.during(ASKED, lambda side: None) == undisturbed
