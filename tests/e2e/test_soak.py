"""Minutes of random traffic, malformed requests and a killed server. ``scripts/test.sh -m slow`` runs it.

SOAK_SECONDS sets for how long (180). ``pytest -s`` shows the figures.

What a server holds is looked at when nothing runs: after a first round of requests, half-way and at the end.
oneDNN keeps kernels for each number of tokens that a step has had, 1,024 in all, and drafts bring more such
numbers. That is no leak, but hides one: here it may keep few.
"""

import os
import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from engines import DEMO_MODEL, PROMPTS, ROOT
from traffic import Traffic, drive, shapes

from clasp_vllm.tools.servers import Server, serve

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
    "--kv-cache-memory-bytes",
    "536870912",
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
    answers = {}
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
        answers[name] = response.status_code, answer
    return answers


def processes(server: Server) -> list[psutil.Process]:
    parent = psutil.Process(server.pid)
    return [parent, *parent.children(recursive=True)]


@dataclass
class Held:
    """What a server holds while nothing runs.

    Attributes:
        resident: MiB of memory of all its processes.
        threads, files: of all its processes.
    """

    resident: float
    threads: int
    files: int

    @classmethod
    def of(cls, server: Server) -> "Held":
        """Now."""
        family = processes(server)
        return cls(
            sum(process.memory_info().rss for process in family) / 2**20,
            sum(process.num_threads() for process in family),
            sum(process.num_fds() for process in family),
        )


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


@dataclass
class Run:
    """What one server did until it was killed."""

    traffic: Traffic
    metrics: dict[str, float]
    held: list[Held]
    malformed: dict[str, tuple[int, object]]
    answer: str
    orphans: int
    log: str


def run(arguments: list[str], log: Path, leaving: float) -> Run:
    """Traffic, malformed requests, and ``kill -9`` of the process that was started."""
    with ExitStack() as context:
        patch = context.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
        server = context.enter_context(serve(MODEL, *arguments, log=log, port=PORT))
        assert server.port == PORT
        traffic, held = drive(server.url, MODEL, SHAPES, leaving=leaving), []
        for _ in range(2):
            settle(server)
            held.append(Held.of(server))
            traffic.add(drive(server.url, MODEL, SHAPES, seconds=SECONDS / 2))
        metrics = settle(server)
        held.append(Held.of(server))
        malformed, answer = malformed_answers(server), ask(server)
        family = processes(server)
        os.kill(server.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(family, timeout=20)
    print(
        f"\nsoak of {SECONDS:.0f} s: {traffic.counts['answered']} answered, {traffic.counts['left']} left, "
        f"{metrics['num_preemptions']:.0f} preemptions, "
        f"{metrics.get('spec_decode_num_accepted_tokens', 0):.0f} draft tokens accepted, "
        f"{len(alive)} processes left over by kill -9; after the first round, half-way and at the end:"
    )
    print(*held, sep="\n")
    text = log.read_text(errors="replace")
    return Run(traffic, metrics, held, malformed, answer, len(alive), text)


@pytest.fixture(scope="module")
def clasp(tmp_path_factory) -> Run:
    return run(CLASP, tmp_path_factory.mktemp("clasp") / "log", leaving=0.25)


@pytest.fixture(scope="module")
def plain(clasp, tmp_path_factory) -> Run:
    """Started on the port of the server killed before."""
    return run(PLAIN, tmp_path_factory.mktemp("plain") / "log", leaving=0)


def test_no_error(clasp):
    assert clasp.traffic.errors == []
    assert clasp.traffic.counts["answered"] > len(SHAPES) / 2
    assert clasp.traffic.counts["left"] > 10
    assert "Traceback" not in clasp.log
    assert " ERROR " not in clasp.log
    assert clasp.metrics["layer_skip_failures"] == 0
    assert clasp.metrics["layer_skip_rounds"] > 0


def test_cache_is_empty_again(clasp):
    assert clasp.metrics["num_requests_running"] == clasp.metrics["num_requests_waiting"] == 0
    assert clasp.metrics["kv_cache_usage_perc"] == 0
    assert clasp.metrics["num_preemptions"] > 0


def test_memory_is_steady(clasp, plain):
    """It grows no more than plain vLLM's under the same traffic."""
    grown, by_itself = (of.held[-1].resident - of.held[0].resident for of in (clasp, plain))
    assert grown < by_itself + 100


def test_threads_and_files_are_steady(clasp):
    _, half, end = clasp.held
    assert end.threads <= half.threads
    assert end.files <= half.files + 5


def test_answers_are_plain_vllms(clasp, plain):
    greedy = {index for index, shape in enumerate(SHAPES) if shape["temperature"] == 0}
    assert plain.traffic.texts.keys() == greedy
    assert len(clasp.traffic.texts) > 60
    for index, texts in clasp.traffic.texts.items():
        assert len(texts) == 1
        assert texts == plain.traffic.texts[index], SHAPES[index]


def test_malformed_requests(clasp, plain):
    assert clasp.malformed == plain.malformed
    assert {status for status, _ in clasp.malformed.values()} >= {400, 404, 405}


def test_a_killed_server_can_be_started_again(clasp, plain, tmp_path):
    """vLLM 0.32 itself leaves idle children behind when its first process is killed; we add none."""
    assert clasp.orphans <= plain.orphans
    with serve(MODEL, *CLASP, log=tmp_path / "log", port=PORT) as server:
        assert server.port == PORT
        assert ask(server) == clasp.answer == plain.answer
