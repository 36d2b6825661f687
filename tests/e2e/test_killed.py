"""A server that is killed in whatever phase leaves nothing behind that keeps the next one from starting."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
from engines import DEMO_MODEL, PROMPTS, engine_process, generate, running

from clasp_vllm.tools.servers import serve

pytestmark = pytest.mark.slow

MODEL = str(DEMO_MODEL)
PORT = 8251
ARGUMENTS = ["--dtype=float32", "--enforce-eager", "--max-model-len=512", "--max-num-seqs=8"]
ARGUMENTS += ["--kv-cache-memory-bytes=268435456"]
# Costs are measured, and drafts are always made.
ARGUMENTS += ['--speculative-config={"method": "clasp", "draft_weights": "int8", "adaptive": ["length"]}']
# What the log says when a phase begins. Graphs are captured on GPUs alone.
PHASES = {
    "loading": "Starting to load model",
    "quantising": "Layer skipping: int8 draft weights by",
    "measuring": "KV cache initialized for CPU backend",
}


def kill_when(words: str, log: Path) -> str:
    """Start a server, kill all its processes once it logs the words, and return the log."""
    vllm = Path(sys.executable).with_name("vllm")
    with log.open("w") as output:
        process = subprocess.Popen(
            [vllm, "serve", MODEL, "--host=127.0.0.1", f"--port={PORT}", *ARGUMENTS],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + 300
    try:
        while words not in log.read_text(errors="replace"):
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
            assert process.poll() is None, log.read_text(errors="replace")[-3000:]
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return log.read_text(errors="replace")


def plain_texts() -> list[str]:
    with running(max_num_seqs=8) as llm:
        return generate(llm, PROMPTS[:4], max_tokens=48).texts


def test_killed_in_each_phase(monkeypatch, tmp_path):
    """One after the other on the same port and with the same caches, the last while it drafts."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for phase, words in PHASES.items():
        text = kill_when(words, tmp_path / f"{phase}.log")
        assert "Application startup complete" not in text
    asked = {"model": MODEL, "max_tokens": 48, "temperature": 0, "extra_body": {"ignore_eos": True}}
    with serve(MODEL, *ARGUMENTS, log=tmp_path / "drafting.log", port=PORT) as server:
        assert server.port == PORT
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120)
        long = asked | {"max_tokens": 400, "stream": True}
        streams = [client.completions.create(prompt=p, **long) for p in PROMPTS[:4]]
        while not server.metrics().get("layer_skip_rounds"):
            time.sleep(0.01)
        os.killpg(server.pid, signal.SIGKILL)
        with pytest.raises(Exception):  # noqa: B017, PT011 - of whatever HTTP library is below
            list(streams[0])
    with serve(MODEL, *ARGUMENTS, log=tmp_path / "last.log", port=PORT) as server:
        assert server.port == PORT
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120)
        texts = [client.completions.create(prompt=p, **asked).choices[0].text for p in PROMPTS[:4]]
        assert server.counters()["num_accepted_tokens"] > 0
    with engine_process("v1") as call:
        assert texts == call(plain_texts)
