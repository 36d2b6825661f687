"""Two data-parallel engines behind one server: each drafts for itself."""

import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from engines import DEMO_MODEL, PROMPTS, engine_process, generate, running

from clasp_vllm.tools.servers import serve

pytestmark = pytest.mark.slow

ARGUMENTS = [
    "--dtype",
    "float32",
    "--enforce-eager",
    "--max-model-len",
    "512",
    "--max-num-seqs",
    "8",
    "--kv-cache-memory-bytes",
    "268435456",
    "--data-parallel-size",
    "2",
    "--speculative-config",
    '{"method": "clasp", "adaptive": false}',  # whether speculation pays is another question
]


def plain_texts() -> list[str]:
    with running() as llm:
        return generate(llm, PROMPTS, max_tokens=32).texts


def test_both_engines_draft_and_answer_as_plain_vllm(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    model = str(DEMO_MODEL)
    with serve(model, *ARGUMENTS, log=tmp_path / "log", port=8251) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=300)

        def ask(prompt: str) -> str:
            response = client.completions.create(
                model=model, prompt=prompt, max_tokens=32, temperature=0, extra_body={"ignore_eos": True}
            )
            return response.choices[0].text

        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            texts = list(pool.map(ask, PROMPTS))
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as response:
            metrics = response.read().decode()
    monkeypatch.undo()
    with engine_process("v1") as call:
        assert texts == call(plain_texts)
    rounds = dict(re.findall(r'vllm:layer_skip_rounds_total{engine="(\d)",[^}]*} (\S+)', metrics))
    assert rounds.keys() == {"0", "1"}
    assert all(float(count) > 0 for count in rounds.values())
