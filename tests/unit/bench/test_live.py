"""Looking at a running server: from what /metrics says to what is drafted."""

from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from clasp_vllm.bench.live import read, report
from clasp_vllm.cli import main

NAMES = ["model_name", "engine"]
LABELS = ["model", "0"]


class Metrics:
    """A server's metrics, with the names and labels that it gives them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.gauge("num_requests_running", 3)
        self.drafts = self.counter("spec_decode_num_drafts")
        self.accepted = self.counter("spec_decode_num_accepted_tokens")
        self.first = self.counter("spec_decode_num_accepted_tokens_per_pos", "position").labels(*LABELS, "0")

    def gauge(self, name: str, value: float) -> None:
        Gauge(f"vllm:{name}", "", NAMES, registry=self.registry).labels(*LABELS).set(value)

    def counter(self, name: str, *more: str) -> Counter:
        made = Counter(f"vllm:{name}", "", [*NAMES, *more], registry=self.registry)
        return made if more else made.labels(*LABELS)

    def ours(self) -> None:
        """The plugin's, as with one of its methods."""
        info = Gauge(
            "vllm:layer_skip_config_info", "", [*NAMES, "method", "draft_weights"], registry=self.registry
        )
        info.labels(*LABELS, "clasp", "int8").set(1)
        for name, value in (
            ("draft_length", 4),
            ("skipped_layers", 2),
            ("draft_context", 0),
            ("expected_ratio", 1.5),
        ):
            self.gauge(f"layer_skip_{name}", value)
        self.kept = self.counter("layer_skip_kept_layers_count")
        self.skipped = self.counter("layer_skip_skipped", "layer")


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def url(metrics) -> Iterator[str]:
    server, thread = start_http_server(0, "127.0.0.1", metrics.registry)
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


def test_what_happened_between_two_looks(metrics, url):
    metrics.ours()
    metrics.drafts.inc(1000)
    metrics.skipped.labels(*LABELS, "7").inc(1000)
    before, _ = read(url)
    metrics.drafts.inc(10)
    metrics.accepted.inc(12)
    metrics.first.inc(9)
    metrics.kept.inc(8)
    metrics.skipped.labels(*LABELS, "7").inc(8)
    metrics.skipped.labels(*LABELS, "11").inc(2)
    after, settings = read(url + "/v1")
    lines = report(before, after, settings, 5.0).splitlines()
    assert lines[0] == "engine 0: method clasp, draft weights int8, 3 requests running"
    assert lines[1].endswith(
        "4 draft tokens, 2 layers skipped, all of the context, 1.50 times plain decoding expected"
    )
    assert "10 drafts, 0 of them looked up; 0 steps without drafts" in lines[2]
    assert "mean accepted length 2.20, accepted by position 0.90" in lines[2]
    assert [line.split() for line in lines[4:]] == [["7", "█" * 20, "100%"], ["11", "█" * 5, "25%"]]


def test_off_and_nothing_chosen(metrics, url):
    metrics.ours()
    snapshot, settings = read(url)
    snapshot["0"]["layer_skip_draft_length"] = 0.0
    snapshot["0"]["layer_skip_draft_context"] = 1280.0
    assert "drafting is off; the best draft: 2 layers skipped, 1280 tokens" in report(
        snapshot, snapshot, settings, 1.0
    )
    del snapshot["0"]["layer_skip_expected_ratio"]
    assert "nothing is chosen" in report(snapshot, snapshot, settings, 1.0)


def test_what_cannot_be_looked_at(metrics, url, capsys):
    assert main(["inspect", "http://127.0.0.1:1"]) == 2
    assert "http://127.0.0.1:1/metrics: no metrics there" in capsys.readouterr().err
    assert main(["inspect", url]) == 2
    assert "drafts by none of the plugin's methods" in capsys.readouterr().err
    assert main(["inspect", url, "--prompt", "a"]) == 2
    assert "--prompt" in capsys.readouterr().err
