"""The real Prometheus watching a real server with two API processes: the dashboard's questions have answers.

Needs Debian's package prometheus, or PROMETHEUS=path of the program.
"""

import json
import os
import shutil
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import openai
import pytest
import yaml
from engines import DEMO_MODEL, PROMPTS, ROOT

from clasp_vllm.tools.servers import free_port, serve

pytestmark = pytest.mark.slow

PROMETHEUS = os.environ.get("PROMETHEUS") or shutil.which("prometheus")
BOARD = json.loads((ROOT / "docker" / "grafana" / "dashboards" / "clasp_vllm.json").read_text())
EXPRESSIONS = [target["expr"] for panel in BOARD["panels"] for target in panel.get("targets", [])]
ARGUMENTS = ["--dtype=float32", "--enforce-eager", "--max-model-len=512", "--max-num-seqs=8"]
ARGUMENTS += ["--kv-cache-memory-bytes=268435456", "--api-server-count=2"]
# What Grafana puts in the place of its variables.
VARIABLES = {"$__rate_interval": "1m", "$__range": "5m", "$model_name": ".*", "$engine": ".*"}
ROUNDS, REQUESTS, TOKENS = 3, 12, 24


def get(url: str) -> dict:
    with urllib.request.urlopen(url, timeout=10) as response:
        return json.load(response)


def ask(port: int, expression: str) -> list[dict]:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return get(f"http://127.0.0.1:{port}/api/v1/query?query={quote(expression)}")["data"]["result"]


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, list[dict]]:
    """Prometheus' answer to each expression, once it has seen what the server tells, and its counters."""
    assert PROMETHEUS, "no prometheus: apt-get install prometheus, or set PROMETHEUS"
    folder: Path = tmp_path_factory.mktemp("prometheus")
    port = free_port(9190)
    with serve(
        DEMO_MODEL,
        *ARGUMENTS,
        '--speculative-config={"method": "clasp", "adaptive": ["length"], "ngram_cascade": false}',
        log=folder / "server.log",
        port=8190,
    ) as server:
        config = yaml.safe_load((ROOT / "docker" / "prometheus.yml").read_text())
        config["global"]["scrape_interval"] = "2s"
        config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{server.port}"]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        with (folder / "prometheus.log").open("w") as log:
            watching = subprocess.Popen(
                [PROMETHEUS, *options, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
            )
        try:
            for _ in range(ROUNDS):
                generate(server.url)
                time.sleep(5)
            expected, counted = server.metrics(), []
            deadline = time.monotonic() + 120
            while counters(counted).items() - expected.items() or not counted:
                assert time.monotonic() < deadline, (counted, expected)
                time.sleep(1)
                counted = ask(port, '{__name__=~"vllm:(layer_skip|spec_decode).*_total"}')
            samples = {expression: ask(port, expression) for expression in EXPRESSIONS}
            samples["counters"] = counted
            samples["drafted"] = ask(port, "vllm:layer_skip_kept_layers_count")
            return samples
        finally:
            watching.terminate()
            watching.wait(20)


def counters(samples: list[dict]) -> dict[str, float]:
    """Sums over the labels, by name."""
    sums: dict[str, float] = {}
    for sample in samples:
        labels = sample["metric"]
        name = labels["__name__"].removeprefix("vllm:").removesuffix("_total")
        if "position" not in labels:
            sums[name] = sums.get(name, 0) + float(sample["value"][1])
    return sums


def generate(url: str) -> None:
    """Requests over connections of their own, so that both API processes get some."""

    def complete(prompt: str) -> None:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
            client.completions.create(
                model=str(DEMO_MODEL),
                prompt=prompt,
                max_tokens=TOKENS,
                temperature=0,
                extra_body={"ignore_eos": True},
            )

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(complete, PROMPTS[:REQUESTS]))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_question_of_the_dashboard_has_an_answer(answers, expression):
    if "layer_skip_prompts" in expression:  # by task, with method knn_ssd alone
        assert answers[expression] == []
        return
    assert answers[expression], expression
    assert all(sample["value"][1] != "NaN" for sample in answers[expression])


def test_with_two_api_processes_everything_counts_once(answers):
    """A draft that is verified was drafted, and the tokens that were asked for are all there are."""
    seen, (drafted,) = counters(answers["counters"]), counters(answers["drafted"]).values()
    requests = ROUNDS * REQUESTS
    verified, accepted = seen["spec_decode_num_drafts"], seen["spec_decode_num_accepted_tokens"]
    assert requests < verified <= drafted <= verified + requests  # the last drafts of each may be too late
    assert verified + accepted <= requests * TOKENS
