"""The HTTP server with the real openai client."""

import asyncio
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from engines import DEMO_MODEL, PROMPTS, engine_process, generate, running
from traffic import drive, shapes

from clasp_vllm.bench import live
from clasp_vllm.tools.servers import Server, serve

MODEL = str(DEMO_MODEL)
ARGUMENTS = [
    "--dtype",
    "float32",
    "--enforce-eager",
    "--max-model-len",
    "512",
    "--max-num-seqs",
    "16",
    "--kv-cache-memory-bytes",
    "536870912",
    "--speculative-config",
    '{"method": "clasp", "adaptive": false}',  # whether speculation pays is another question
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve(MODEL, *ARGUMENTS, log=tmp_path_factory.mktemp("server") / "log", port=8123) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def plain() -> list[str]:
    with engine_process("v1") as call:
        return call(plain_texts)


def plain_texts() -> list[str]:
    with running() as llm:
        return generate(llm, PROMPTS[:8], max_tokens=48).texts


def complete(client: openai.OpenAI, prompt: str, stream: bool) -> str:
    response = client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=48,
        temperature=0,
        stream=stream,
        extra_body={"ignore_eos": True},
    )
    if not stream:
        return response.choices[0].text
    return "".join(chunk.choices[0].text for chunk in response if chunk.choices)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streaming"])
def test_concurrent_completions_equal_plain_vllm(client, server, plain, stream):
    before = server.counters()
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda prompt: complete(client, prompt, stream), PROMPTS[:8]))
    assert texts == plain
    after = server.counters()
    for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_accepted_tokens_per_pos[0]"):
        assert after[name] > before.get(name, 0), name


def chat(client: openai.OpenAI, question: str, stream: bool) -> str:
    response = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        max_tokens=40,
        temperature=0,
        stream=stream,
    )
    if not stream:
        return response.choices[0].message.content
    return "".join(chunk.choices[0].delta.content or "" for chunk in response if chunk.choices)


def test_chat_streaming_equals_whole(client):
    questions = ["A box holds 12 pens. How many pens are in 7 boxes?", "How far is it?", "Why?"]
    with ThreadPoolExecutor(3) as pool:
        whole = list(pool.map(lambda q: chat(client, q, False), questions))
        streamed = list(pool.map(lambda q: chat(client, q, True), questions))
    assert whole == streamed
    assert all(whole)


def test_sampled_requests_and_greedy_ones_share_the_server(client, plain):
    def sampled(seed: int) -> str:
        return (
            client.completions.create(
                model=MODEL, prompt=PROMPTS[0], max_tokens=32, temperature=1.0, top_p=0.9, seed=seed
            )
            .choices[0]
            .text
        )

    with ThreadPoolExecutor(8) as pool:
        samples = [pool.submit(sampled, seed) for seed in range(4)]
        greedy = [pool.submit(complete, client, prompt, True) for prompt in PROMPTS[:4]]
    assert [future.result() for future in greedy] == plain[:4]
    assert len({future.result() for future in samples}) == 4


def test_a_bad_request_leaves_the_server_serving(client, plain):
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt="x " * 5000, max_tokens=5)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="x", max_tokens=5)
    stream = client.completions.create(
        model=MODEL, prompt=PROMPTS[1], max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()  # the client goes away
    assert complete(client, PROMPTS[0], False) == plain[0]


def test_logit_bias_and_min_p_are_served(client):
    """vLLM answers both with status 400 under any other method."""
    arguments = {"model": MODEL, "prompt": PROMPTS[0], "max_tokens": 12, "logprobs": 0}
    forced = client.completions.create(**arguments, temperature=0, logit_bias={"300": 100})
    assert len(set(forced.choices[0].logprobs.tokens)) == 1
    likeliest = client.completions.create(**arguments, temperature=1, extra_body={"min_p": 1.0})
    greedy = client.completions.create(**arguments, temperature=0)
    assert likeliest.choices[0].logprobs.tokens == greedy.choices[0].logprobs.tokens


def test_a_request_may_decline_drafts(client, server, plain):
    def drafted(**xargs: bool) -> tuple[float, str]:
        before = server.counters().get("num_draft_tokens", 0)
        body = {"ignore_eos": True, "vllm_xargs": xargs}
        response = client.completions.create(
            model=MODEL, prompt=PROMPTS[1], max_tokens=48, temperature=0, extra_body=body
        )
        return server.counters()["num_draft_tokens"] - before, response.choices[0].text

    assert drafted(layer_skip=True)[0] > 0
    assert drafted(layer_skip=False) == (0, plain[1])


@pytest.mark.parametrize(
    ("xargs", "message"),
    [
        ({"layer_skip": "no"}, "layer_skip='no' must be true or false"),
        ({"layer_skip": 2}, "layer_skip=2 must be true or false"),
        ({"layer_skip": [0] * 10**6}, "layer_skip=[0, 0,"),
        ({"layer_skip": "x" * 10**6}, "layer_skip='xxx"),
        ({"layer_skip": {"on": False}}, "vllm_xargs"),
        ({"layer_skip": None}, "vllm_xargs"),
        ("layer_skip", "vllm_xargs"),
        ([["layer_skip", False]], "vllm_xargs"),
        ({"layer_skips": False}, "layer_skips=0 is not known; allowed is layer_skip"),
    ],
)
def test_wrong_parameters_are_refused(client, plain, xargs, message):
    with pytest.raises(openai.BadRequestError, match=re.escape(message)):
        client.completions.create(model=MODEL, prompt="a", max_tokens=2, extra_body={"vllm_xargs": xargs})
    assert complete(client, PROMPTS[0], False) == plain[0]


@pytest.mark.parametrize("value", ["NaN", "1e999", "9" * 5000, "[" * 10**5, '{"a":' * 10**5, "tru"])
def test_bodies_that_aim_at_our_parameter(client, server, plain, value):
    """Written out, for no client would."""
    body = f'{{"model": "{MODEL}", "prompt": "a", "vllm_xargs": {{"layer_skip": {value}}}}}'
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{server.url}/completions", content=body, headers=headers, timeout=60)
    assert response.status_code in (400, 422), response.text
    assert len(response.text) < 10_000
    assert complete(client, PROMPTS[0], False) == plain[0]


def greedy_texts(requests: list[dict]) -> list[str]:
    """Plain vLLM's answers to requests of tests/traffic.py."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            max_tokens=shape["max_tokens"],
            temperature=0.0,
            stop=shape.get("stop"),
            frequency_penalty=shape.get("frequency_penalty", 0.0),
            **shape["extra_body"],
        )
        for shape in requests
    ]
    with running() as llm:
        outputs = llm.generate([shape["prompt"] for shape in requests], params, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


def test_random_traffic_with_clients_that_leave(server):
    """A short form of test_soak."""
    requests = [shape | {"max_tokens": min(shape["max_tokens"], 40)} for shape in shapes(60)]
    traffic = drive(server.url, MODEL, requests, concurrency=30)
    assert traffic.errors == []
    assert traffic.counts["answered"] + traffic.counts["left"] == 60
    assert traffic.counts["left"] > 3
    with engine_process("v1") as call:
        plain = call(greedy_texts, [requests[index] for index in traffic.texts])
    assert len(plain) > 20
    assert list(traffic.texts.values()) == [{text} for text in plain]
    metrics = server.metrics()
    assert metrics["layer_skip_failures"] == 0
    assert metrics["layer_skip_optimized"] >= metrics["layer_skip_passes"] > 0
    assert metrics["layer_skip_optimized"] >= metrics["layer_skip_changed"] > 0
    assert metrics["layer_skip_pass_seconds"] > 0
    assert metrics["layer_skip_early_exit_tokens"] > 0
    assert 0.5 < metrics["layer_skip_similarity"] < 1
    with urllib.request.urlopen(server.url.replace("/v1", "/metrics"), timeout=30) as response:
        text = response.read().decode()
    kept = dict(re.findall(r"vllm:layer_skip_kept_layers_(bucket|count|sum){[^}]*} (\S+)", text))
    assert float(kept["sum"]) == 12 * float(kept["count"])  # half of 24
    # Not so after much traffic: where one token of a prompt is left to read, vLLM pads it with drafts of -1.
    assert float(kept["count"]) >= metrics["spec_decode_num_drafts"]
    snapshot, settings = live.read(server.url)
    skipped = sum(value for name, value in snapshot["0"].items() if name.startswith("layer_skip_skipped["))
    assert skipped == float(kept["sum"])
    nothing = {"0": dict.fromkeys(snapshot["0"], 0.0)}
    report = live.report(nothing, snapshot, settings, 1.0)
    assert "engine 0: method clasp, draft weights target, 0 requests running" in report
    assert "layers skipped, share of" in report


async def scrape(url: str, scrapes: int, seconds: float) -> list[str]:
    """Ask for /metrics again and again, whether or not the last has been answered."""
    async with httpx.AsyncClient(timeout=120) as client:
        tasks = []
        for _ in range(scrapes):
            tasks.append(asyncio.create_task(client.get(url)))
            await asyncio.sleep(seconds / scrapes)
        responses = await asyncio.gather(*tasks)
    assert {response.status_code for response in responses} == {200}
    return [response.text for response in responses]


@pytest.mark.slow
def test_a_hundred_scrapes_a_second_while_requests_run(server):
    """All are answered, and the requests as without scrapes."""
    requests = [shape for shape in shapes(100) if shape["temperature"] == 0]
    quiet = drive(server.url, MODEL, requests, concurrency=16, leaving=0)
    url = server.url.replace("/v1", "/metrics")
    with ThreadPoolExecutor(1) as pool:
        texts = pool.submit(lambda: asyncio.run(scrape(url, 2000, 20)))
        busy = drive(server.url, MODEL, requests, concurrency=16, leaving=0, seconds=20)
        pages = texts.result()
    assert quiet.errors == busy.errors == []
    assert busy.texts == quiet.texts
    assert len(pages) == 2000
    rounds = [float(re.search(r"vllm:layer_skip_rounds_total{[^}]*} (\S+)", page)[1]) for page in pages]
    assert rounds[-1] > rounds[0]
    assert server.metrics()["layer_skip_failures"] == 0
