"""Two data-parallel engines behind one server: each drafts for itself."""

import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from engines import DEMO_MODEL, PROMPTS, engine_process, generate, running

from clasp_vllm.tools.servers import serve

pytestmark = pytest.mark.slow

MODEL = str(DEMO_MODEL)
LONGEST = 512
ARGUMENTS = [
    "--dtype",
    "float32",
    "--enforce-eager",
    "--max-model-len",
    str(LONGEST),
    "--max-num-seqs",
    "8",
    "--kv-cache-memory-bytes",
    "268435456",
    "--data-parallel-size",
    "2",
    "--speculative-config",
    '{"method": "clasp", "adaptive": false}',  # whether speculation pays is another question
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        with serve(MODEL, *ARGUMENTS, log=tmp_path_factory.mktemp("server") / "log", port=8251) as server:
            yield server


def ask(server, prompts: list) -> list[str]:
    """Answers to all prompts at once."""
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=300)

    def complete(prompt) -> str:
        response = client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=32, temperature=0, extra_body={"ignore_eos": True}
        )
        return response.choices[0].text

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(complete, prompts))


def by_engine(server, name: str) -> dict[str, float]:
    """A counter's values, summed over its other labels."""
    with urllib.request.urlopen(server.url.replace("/v1", "/metrics"), timeout=30) as response:
        text = response.read().decode()
    counts: dict[str, float] = {}
    for engine, value in re.findall(rf'^vllm:{name}_total{{engine="(\d)"[^}}]*}} (\S+)', text, re.MULTILINE):
        counts[engine] = counts.get(engine, 0) + float(value)
    return counts


def plain_texts() -> list[str]:
    with running() as llm:
        return generate(llm, PROMPTS, max_tokens=32).texts


def test_both_engines_draft_and_answer_as_plain_vllm(server):
    texts = ask(server, PROMPTS)
    with engine_process("v1") as call:
        assert texts == call(plain_texts)
    rounds = by_engine(server, "layer_skip_rounds")
    assert rounds.keys() == {"0", "1"}
    assert all(count > 0 for count in rounds.values())


def test_an_answer_up_to_the_end_of_the_context_stops_no_engine(server):
    """vLLM issue 44185: with the other engine idle, both hung after it."""
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=300)
    first = ask(server, PROMPTS[:4])
    for _ in range(2):
        response = client.completions.create(
            model=MODEL,
            prompt=[300] * 12,
            max_tokens=LONGEST - 12,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        assert response.choices[0].finish_reason == "length"
        assert response.usage.total_tokens == LONGEST
    assert ask(server, PROMPTS[:4]) == first


def test_accepted_tokens_count_once_at_each_position(server):
    """speculators issue 1095: acceptance by position was divided by the number of engines."""
    ask(server, PROMPTS)
    accepted = by_engine(server, "spec_decode_num_accepted_tokens")
    assert accepted == by_engine(server, "spec_decode_num_accepted_tokens_per_pos")
    assert accepted.keys() == {"0", "1"}
    counters = server.counters()
    drafts = counters["num_drafts"]
    by_position = [value / drafts for name, value in counters.items() if "per_pos" in name]
    assert 1 + counters["num_accepted_tokens"] / drafts == pytest.approx(1 + sum(by_position))
    assert sum(accepted.values()) > 0
