"""What a running server drafts now: its /metrics, read twice. Nothing is changed there."""

from __future__ import annotations

import time
import urllib.request
from collections import defaultdict

from prometheus_client.parser import text_string_to_metric_families

from clasp_vllm.bench.serving import accepted
from clasp_vllm.tools.servers import series_name

BAR = 20  # characters of a layer that every draft skips

# By engine: the value of each series, by its ``series_name``.
Snapshot = dict[str, dict[str, float]]
Settings = dict[str, dict[str, str]]  # by engine, the labels of vllm:layer_skip_config_info


def read(url: str) -> tuple[Snapshot, Settings]:
    """The series of vLLM and the plugin.

    Raises:
        ValueError: there are none at ``url``, or none of the plugin's; the message says so.
    """
    at = url.rstrip("/").removesuffix("/metrics").removesuffix("/v1") + "/metrics"
    try:
        with urllib.request.urlopen(at, timeout=30) as response:
            text = response.read().decode()
        families = list(text_string_to_metric_families(text))
    except (OSError, ValueError) as error:
        raise ValueError(f"{at}: no metrics there ({error})") from None
    snapshot: Snapshot = defaultdict(lambda: defaultdict(float))
    settings: Settings = {}
    for sample in (sample for family in families for sample in family.samples):
        name = series_name(sample)
        engine = sample.labels.get("engine", "0")
        if name == "layer_skip_config_info":
            settings[engine] = sample.labels
        snapshot[engine][name] += sample.value
    if not settings:
        raise ValueError(f"{at}: that server drafts by none of the plugin's methods")
    return snapshot, settings


def report(before: Snapshot, after: Snapshot, settings: Settings, seconds: float) -> str:
    """What each engine drafts now, and has drafted in between."""
    lines = []
    for engine, labels in sorted(settings.items()):
        now = after[engine]
        counts = {name: value - before[engine].get(name, 0.0) for name, value in now.items()}
        kind = f"method {labels['method']}, draft weights {labels['draft_weights']}"
        lines.append(f"engine {engine}: {kind}, {now['num_requests_running']:.0f} requests running")
        lines.append(f"  now: {_choice(now)}")
        lines.append(f"  in {seconds:.0f} s: {_counts(counts)}")
        lines += _layers(counts)
    return "\n".join(lines)


def _choice(now: dict[str, float]) -> str:
    if "layer_skip_expected_ratio" not in now:
        return "nothing is chosen: there is no controller, or no request so far"
    length, skipped = now["layer_skip_draft_length"], now["layer_skip_skipped_layers"]
    context = f"{now['layer_skip_draft_context']:.0f} tokens" if now["layer_skip_draft_context"] else "all"
    expected = f"{now['layer_skip_expected_ratio']:.2f} times plain decoding"
    choice = f"{skipped:.0f} layers skipped, {context} of the context, {expected} expected"
    return f"{length:.0f} draft tokens, {choice}" if length else f"drafting is off; the best draft: {choice}"


def _counts(counts: dict[str, float]) -> str:
    drafts = f"{counts.get('spec_decode_num_drafts', 0.0):.0f} drafts"
    said = [f"{drafts}, {counts.get('layer_skip_ngrams', 0.0):.0f} of them looked up"]
    said.append(f"{counts.get('layer_skip_plain_steps', 0.0):.0f} steps without drafts")
    length, by_position = accepted(counts)
    if length is not None:
        positions = " ".join(f"{share:.2f}" for share in by_position)
        said.append(f"mean accepted length {length:.2f}, accepted by position {positions}")
    if counts.get("layer_skip_failures"):
        said.append(f"{counts['layer_skip_failures']:.0f} rounds failed")
    return "; ".join(said)


def _layers(counts: dict[str, float]) -> list[str]:
    """A bar for each layer that was skipped: by the share of the drafts made by skipping."""
    prefix, drafts = "layer_skip_skipped[", counts.get("layer_skip_kept_layers_count", 0.0)
    skipped = {int(k[len(prefix) : -1]): v for k, v in counts.items() if k.startswith(prefix) and v}
    if not drafts:
        return []
    if not skipped:
        return ["  no layer was skipped"]
    lines = [f"  layers skipped, share of {drafts:.0f} drafts made by skipping:"]
    for layer, count in sorted(skipped.items()):
        share = count / drafts
        lines.append(f"  {layer:3d} {'█' * round(BAR * share):<{BAR}} {share:.0%}")
    return lines


def watch(url: str, seconds: int) -> str:
    """Read twice, ``seconds`` apart: see ``report``.

    Raises:
        ValueError: see ``read``.
    """
    before, _ = read(url)
    started = time.monotonic()
    time.sleep(seconds)
    after, settings = read(url)
    return report(before, after, settings, time.monotonic() - started)
