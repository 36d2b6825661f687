"""The drafter's counts, and its drafts, on vLLM's own way from the workers to /metrics.

A worker's output has a slot for the statistics of an encoder-cache connector, which the scheduler
hands on to one front-end, with tensor parallelism from one rank. That connector serves multimodal
models, which layer skipping refuses, so the slot is free.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorStats
from vllm.platforms import current_platform
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import RequestSpecDecodeMetrics
from vllm.v1.metrics.utils import create_metric_per_engine
from vllm.v1.outputs import DraftTokenIds, ECConnectorOutput, ModelRunnerOutput

from clasp_vllm.drafting.drafter import Drafter
from clasp_vllm.drafting.statistics import COUNTERS, GAUGES
from clasp_vllm.engine.speculative_config import layer_skip_config

KEY = "layer_skip"
TASKS = "layer_skip_tasks"  # prompts, by the task that they were taken for
SKIPPED = "layer_skip_skipped"  # how many drafts skipped each layer
KEPT = "layer_skip_kept"  # drafts, by the layers that they ran
CHOSEN = "layer_skip_chosen"  # what is chosen and used now, by gauge
DRAFTS = "layer_skip_drafts"  # their requests and tokens
ACCEPTANCE = "layer_skip_acceptance"  # of requests that have finished
REQUESTED_LENGTH = "layer_skip_requested_length"  # draft tokens to schedule


def pad_no_requests(scheduler: Any) -> None:
    """Keep vLLM, on CPUs, from padding a new request of one token with drafts of -1.

    Its padding is for CUDA graphs, and its CPU kernel for rejection reads the probability of token -1. With a
    table of draft lengths there is none.
    """
    if scheduler.dynamic_sd_lookup is None and current_platform.is_cpu():
        scheduler.dynamic_sd_lookup = [scheduler.num_spec_tokens] * (scheduler.max_num_running_reqs + 1)


def schedule_requested_length(scheduler: Any, output: ModelRunnerOutput) -> None:
    """Have the scheduler make room for as many draft tokens as the drafter wants, from the next step on.

    By vLLM's own table of draft lengths by batch size; what the user set there is the most.
    """
    length = _take(output, REQUESTED_LENGTH)
    if length is None:
        return
    config = scheduler.vllm_config
    if config.parallel_config.data_parallel_size > 1:
        return  # engines that run in step must verify alike
    longest = getattr(scheduler, "layer_skip_longest", None)
    if longest is None:
        longest = [scheduler.num_spec_tokens] * (scheduler.scheduler_config.max_num_seqs + 1)
        if config.speculative_config.layer_skip.num_speculative_tokens_per_batch_size:
            longest = scheduler.dynamic_sd_lookup
        scheduler.layer_skip_longest = longest
    scheduler.dynamic_sd_lookup = [min(most, length) for most in longest]


def take_drafts(scheduler: Any, output: ModelRunnerOutput) -> None:
    """Keep the drafts that came with a runner's output until the end of the step."""
    drafts = _take(output, DRAFTS)
    if drafts is not None:
        scheduler.layer_skip_drafts = DraftTokenIds(*drafts)


def count_by_request(scheduler: Any) -> None:
    """Have vLLM count each request's drafts, as with --per-request-spec-decode-metrics."""
    for request in scheduler.running:
        if request.spec_decode_metrics is None:
            request.spec_decode_metrics = RequestSpecDecodeMetrics.new(scheduler.num_spec_tokens)


def send_acceptance(scheduler: Any, outputs: dict[int, EngineCoreOutputs]) -> None:
    """Put acceptance rates on the scheduler's statistics, of requests that have just finished.

    The counts themselves go on to the front-end where the user has asked for them only.
    """
    rates = []
    for output in (output for of_client in outputs.values() for output in of_client.outputs):
        counts = output.spec_decode_metrics
        if counts is not None:
            if counts.num_draft_tokens:
                rates.append(counts.to_dict()["draft_acceptance_rate"])
            if scheduler.spec_decode_metrics_level == "none":
                output.spec_decode_metrics = None
    stats = next((of_client.scheduler_stats for of_client in outputs.values()), None)
    if rates and stats is not None:
        stats.ec_connector_stats = (stats.ec_connector_stats or {}) | {ACCEPTANCE: rates}


def _take(output: ModelRunnerOutput, key: str) -> Any:
    """What a runner put on its output for the scheduler, which then is gone from it; None: nothing."""
    slot = output.ec_connector_output
    stats = slot.ec_connector_stats if slot is not None else None
    if stats is None or key not in stats.data:
        return None
    value = stats.data.pop(key)
    if not stats.data:
        slot.ec_connector_stats = None
    return value


def send_counts(drafter: Drafter, output: Any, runner: Any) -> Any:
    """Put what has been counted since the last call on a model runner's output, and return that.

    And its drafts, where they are there already and the scheduler would ask for them in a call of its own:
    on a CPU, with Model Runner V1 and without async scheduling.
    """
    # Where scheduling is asynchronous the output is on its way, inside another.
    outer = output
    for name in ("_model_runner_output", "model_runner_output"):
        output = getattr(output, name, output)
    if not isinstance(output, ModelRunnerOutput):
        return outer
    data = _counted(drafter)
    if runner.device.type == "cpu" and not getattr(runner, "use_async_scheduling", True):
        drafts = runner.take_draft_token_ids()
        data[DRAFTS] = (drafts.req_ids, drafts.draft_token_ids) if drafts is not None else ([], [])
    if not data:
        return outer
    stats = ECConnectorOutput(ec_connector_stats=ECConnectorStats(data=data))
    sent = ModelRunnerOutput.with_ec_conn_output(output, stats)
    return sent if outer is output else outer


def _counted(drafter: Drafter) -> dict[str, Any]:
    """What has been counted since the last call, by the keys it travels under."""
    controller = drafter.controller
    counts = drafter.statistics.take()
    gauges: dict[str, float] = {}
    if counts:
        gauges = {"cuda_graphs": float(drafter.passes.num_graphs)} | drafter.policy.gauges()
        gauges |= controller.gauges() if controller else {}
    data: dict[str, Any] = {
        KEY: counts,
        TASKS: drafter.policy.take_tasks(),
        SKIPPED: drafter.statistics.take_skips(),  # before the next forgets that there were drafts
        KEPT: drafter.statistics.take_kept(),
        CHOSEN: gauges,
    }
    data = {key: value for key, value in data.items() if value}
    length = controller.take_requested_draft_length() if controller else None
    return data if length is None else data | {REQUESTED_LENGTH: length}


class LayerSkipStatLogger(AggregateStatLoggerBase):
    """Prometheus counters, gauges and histograms named vllm:layer_skip_*, one child per engine."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        model_name = vllm_config.model_config.served_model_name
        labels: dict[int, list[object]] = {index: [model_name, str(index)] for index in engine_indexes}
        names = ["model_name", "engine"]
        self._counters = {
            name: create_metric_per_engine(Counter(f"vllm:layer_skip_{name}", meaning, names), labels)
            for name, meaning in COUNTERS.items()
        }
        self._labels = labels  # which tasks there are is only known as they come
        meaning = "Prompts by the task that they were taken for, with method knn_ssd."
        self._prompts = Counter("vllm:layer_skip_prompts", meaning, [*names, "task"])
        num_layers = vllm_config.model_config.get_total_num_hidden_layers()
        buckets = [*range(0, num_layers, -(-num_layers // 16)), num_layers]
        meaning = "Layers that drafts by skipping ran, one per sequence and round."
        kept = Histogram("vllm:layer_skip_kept_layers", meaning, names, buckets=buckets)
        self._kept = create_metric_per_engine(kept, labels)
        meaning = "Drafts by skipping that left the layer out; a half for half of it."
        skipped = Counter("vllm:layer_skip_skipped", meaning, [*names, "layer"])
        self._skipped = {
            engine: [skipped.labels(*values, layer) for layer in range(num_layers)]
            for engine, values in labels.items()
        }
        meaning = "What the speculative configuration says; always 1."
        info = Gauge(
            "vllm:layer_skip_config_info",
            meaning,
            [*names, "method", "draft_weights"],
            multiprocess_mode="mostrecent",
        )
        config = layer_skip_config(vllm_config)
        assert config is not None
        for values in labels.values():
            info.labels(*values, config.method, config.draft_weights).set(1)
        meaning = "Draft tokens accepted of those verified, by request that has finished and had drafts."
        tenths = [tenth / 10 for tenth in range(1, 11)]
        acceptance = Histogram("vllm:layer_skip_request_acceptance_rate", meaning, names, buckets=tenths)
        self._acceptance = create_metric_per_engine(acceptance, labels)
        # Not there until they are known: 0 would say something else.
        self._gauges = {
            name: Gauge(f"vllm:layer_skip_{name}", meaning, names, multiprocess_mode="mostrecent")
            for name, meaning in GAUGES.items()
        }

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Take our counts out of the scheduler's statistics, before other loggers see them."""
        slot = scheduler_stats.ec_connector_stats if scheduler_stats is not None else None
        if not slot or slot.keys().isdisjoint((KEY, TASKS, ACCEPTANCE)):
            return
        scheduler_stats.ec_connector_stats = None
        for name, count in slot.get(KEY, {}).items():
            self._counters[name][engine_idx].inc(count)
        for task, count in slot.get(TASKS, {}).items():
            self._prompts.labels(*self._labels[engine_idx], task).inc(count)
        for skipped, count in zip(self._skipped[engine_idx], slot.get(SKIPPED, ()), strict=False):
            skipped.inc(count)
        for layers, count in slot.get(KEPT, {}).items():
            for _ in range(count):
                self._kept[engine_idx].observe(layers)
        for rate in slot.get(ACCEPTANCE, ()):
            self._acceptance[engine_idx].observe(rate)
        for name, value in slot.get(CHOSEN, {}).items():
            self._gauges[name].labels(*self._labels[engine_idx]).set(value)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
