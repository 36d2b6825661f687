"""The demo's servers: another port when one is taken, a clear end, nothing left behind."""

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from engines import DEMO_MODEL, ROOT

from clasp_vllm.bench.servers import ServerError, free_port, serve


def test_a_port_in_use_gets_another():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port(port) != port


def test_a_server_that_cannot_start_says_why(tmp_path):
    with (
        pytest.raises(ServerError, match=r"(?s)ended with status .*no-such-option"),
        serve(DEMO_MODEL, "--no-such-option", log=tmp_path / "log"),
    ):
        pass


def test_interrupting_the_demo_stops_its_servers(tmp_path):
    demo = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "demo" / "demo.py"), "--logs", str(tmp_path)],
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
