"""Minutes of random traffic, malformed requests and a killed server. ``scripts/test.sh -m slow`` runs it.

SOAK_SECONDS sets for how long (180). ``pytest -s`` shows the figures.
"""

import os
import signal
import time

import httpx
import openai
import psutil
import pytest
from engines import DEMO_MODEL, PROMPTS, ROOT
from servers import Server, serve
from traffic import Traffic, drive, shapes

pytestmark = pytest.mark.slow

MODEL = str(DEMO_MODEL)
PORT = 8241
PLAIN = [
    "--dtype",
    "float32",
    "--enforce-eager",
    "--max-model-len",
    "1024",
    "--max-num-seqs",
    "32",
    "--num-gpu-blocks-override",
    "150",
    "--block-size",
    "32",
]
CLASP = [*PLAIN, "--speculative-config", str(ROOT / "configs" / "clasp.yaml")]
SECONDS = float(os.environ.get("SOAK_SECONDS", "180"))
SHAPES = shapes(200)

MALFORMED = {
    "not JSON": ("POST", "/v1/completions", b"{"),
    "no prompt": ("POST", "/v1/completions", b'{"model": "MODEL"}'),
    "empty body": ("POST", "/v1/completions", b""),
    "wrong types": (
        "POST",
        "/v1/completions",
        b'{"model": "MODEL", "prompt": {"a": 1}, "max_tokens": "x"}',
    ),
    "negative length": ("POST", "/v1/completions", b'{"model": "MODEL", "prompt": "a", "max_tokens": -1}'),
    "hot": ("POST", "/v1/completions", b'{"model": "MODEL", "prompt": "a", "temperature": -3}'),
    "top_p": ("POST", "/v1/completions", b'{"model": "MODEL", "prompt": "a", "top_p": 7}'),
    "bad token": ("POST", "/v1/completions", b'{"model": "MODEL", "prompt": [999999999]}'),
    "empty prompt": ("POST", "/v1/completions", b'{"model": "MODEL", "prompt": ""}'),
    "other model": ("POST", "/v1/completions", b'{"model": "other", "prompt": "a"}'),
    "bad regex": (
        "POST",
        "/v1/completions",
        b'{"model": "MODEL", "prompt": "a", "structured_outputs": {"regex": "("}}',
    ),
    "bad schema": (
        "POST",
        "/v1/completions",
        b'{"model": "MODEL", "prompt": "a", "structured_outputs": {"json": {"type": "nothing"}}}',
    ),
    "no messages": ("POST", "/v1/chat/completions", b'{"model": "MODEL", "messages": []}'),
    "odd role": (
        "POST",
        "/v1/chat/completions",
        b'{"model": "MODEL", "messages": [{"role": 5, "content": "a"}]}',
    ),
    "no such path": ("GET", "/v1/nothing", b""),
    "wrong verb": ("GET", "/v1/completions", b""),
}


def malformed_answers(server: Server) -> dict[str, tuple[int, object]]:
    """Status and error message of each malformed request."""
    found = {}
    for name, (verb, path, body) in MALFORMED.items():
        content = body.replace(b"MODEL", MODEL.encode())
        response = httpx.request(
            verb,
            f"http://127.0.0.1:{server.port}{path}",
            content=content,
            headers={"Content-Type": "application/json"},
            timeout=60,
        )
        try:
            answer = response.json()
        except ValueError:
            answer = response.text
        if isinstance(answer, dict) and "choices" in answer:  # served after all: ids and times differ
            answer = [choice["text"] for choice in answer["choices"]]
        found[name] = response.status_code, answer
    return found


def processes(server: Server) -> list[psutil.Process]:
    parent = psutil.Process(server.pid)
    return [parent, *parent.children(recursive=True)]


def memory(server: Server) -> float:
    """Resident memory of the server's processes in MiB."""
    return sum(process.memory_info().rss for process in processes(server)) / 2**20


def settle(server: Server) -> dict[str, float]:
    """The metrics once nothing runs or waits any more."""
    for _ in range(60):
        metrics = server.metrics()
        if not metrics["num_requests_running"] and not metrics["num_requests_waiting"]:
            break
        time.sleep(1)
    return metrics


def ask(server: Server) -> str:
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120)
    response = client.completions.create(model=MODEL, prompt=PROMPTS[1], max_tokens=20, temperature=0)
    return response.choices[0].text


class Found:
    """What the servers did: one run, looked at by several tests."""

    traffic: Traffic
    metrics: dict[str, float]
    memory_warm: float
    memory_end: float
    log: str
    malformed: dict
    malformed_plain: dict
    answer: str
    answer_after_kill: str
    answer_plain: str
    orphans: list[str]
    plain: Traffic


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Found:
    found, folder = Found(), tmp_path_factory.mktemp("soak")
    with serve(MODEL, *CLASP, log=folder / "clasp", port=PORT) as server:
        drive(server.url, MODEL, SHAPES)
        found.memory_warm = memory(server)
        found.traffic = drive(server.url, MODEL, SHAPES, seconds=SECONDS)
        found.metrics = settle(server)
        found.memory_end = memory(server)
        found.malformed = malformed_answers(server)
        found.answer = ask(server)
        family = processes(server)
        os.kill(server.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(family, timeout=30)
        found.orphans = [" ".join(process.cmdline()) for process in alive]
    found.log = (folder / "clasp").read_text(errors="replace")
    with serve(MODEL, *CLASP, log=folder / "again", port=PORT) as server:
        assert server.port == PORT
        found.answer_after_kill = ask(server)
    with serve(MODEL, *PLAIN, log=folder / "plain", port=PORT) as server:
        found.plain = drive(server.url, MODEL, SHAPES)
        while len(found.plain.texts) < sum(shape["temperature"] == 0 for shape in SHAPES):
            found.plain.texts |= drive(server.url, MODEL, SHAPES).texts  # clients leave by chance
        found.malformed_plain = malformed_answers(server)
        found.answer_plain = ask(server)
    print(
        f"\nsoak: {SECONDS:.0f} s, {found.traffic.counts['answered']} answered, "
        f"{found.traffic.counts['left']} left, {found.metrics['num_preemptions']:.0f} preemptions, "
        f"{found.metrics['spec_decode_num_accepted_tokens']:.0f} draft tokens accepted, "
        f"RSS {found.memory_warm:.0f} MiB after the first round, {found.memory_end:.0f} MiB at the end"
    )
    return found


def test_no_error(found):
    assert found.traffic.errors == []
    assert found.traffic.counts["answered"] > len(SHAPES) / 2
    assert found.traffic.counts["left"] > 10
    assert "Traceback" not in found.log
    assert " ERROR " not in found.log
    assert found.metrics["layer_skip_failures"] == 0
    assert found.metrics["layer_skip_optimized"] > 0


def test_cache_is_empty_again(found):
    assert found.metrics["num_requests_running"] == found.metrics["num_requests_waiting"] == 0
    assert found.metrics["kv_cache_usage_perc"] == 0
    assert found.metrics["num_preemptions"] > 0


def test_memory_is_steady(found):
    assert found.memory_end < found.memory_warm * 1.05 + 50


def test_answers_are_plain_vllms(found):
    assert all(len(texts) == 1 for texts in found.plain.texts.values())
    assert len(found.traffic.texts) > 60
    for index, texts in found.traffic.texts.items():
        assert texts == found.plain.texts[index], SHAPES[index]


def test_malformed_requests(found):
    assert found.malformed == found.malformed_plain
    assert {status for status, _ in found.malformed.values()} >= {400, 404, 405}


def test_a_killed_server_can_be_started_again(found):
    assert found.orphans == []
    assert found.answer == found.answer_after_kill == found.answer_plain
