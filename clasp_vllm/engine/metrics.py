"""The drafter's counts on vLLM's own way from the workers to /metrics.

A worker's output has a slot for the statistics of an encoder-cache connector, which the scheduler
hands on to one front-end, with tensor parallelism from one rank. That connector serves multimodal
models, which layer skipping refuses, so the slot is free.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter
from vllm.config import VllmConfig
from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorStats
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.utils import create_metric_per_engine
from vllm.v1.outputs import ECConnectorOutput, ModelRunnerOutput

from clasp_vllm.drafting.statistics import COUNTERS, DraftStatistics

KEY = "layer_skip"


def send_counts(statistics: DraftStatistics, output: Any) -> Any:
    """Put what has been counted since the last call on a model runner's output, and return that."""
    # Where scheduling is asynchronous the output is on its way, inside another.
    outer = output
    for name in ("_model_runner_output", "model_runner_output"):
        output = getattr(output, name, output)
    if not isinstance(output, ModelRunnerOutput):
        return outer
    counts = statistics.take()
    if not counts:
        return outer
    stats = ECConnectorOutput(ec_connector_stats=ECConnectorStats(data={KEY: counts}))
    sent = ModelRunnerOutput.with_ec_conn_output(output, stats)
    return sent if outer is output else outer


class LayerSkipStatLogger(AggregateStatLoggerBase):
    """Prometheus counters named vllm:layer_skip_*, one child per engine."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        model_name = vllm_config.model_config.served_model_name
        labels: dict[int, list[object]] = {index: [model_name, str(index)] for index in engine_indexes}
        self._counters = {
            name: create_metric_per_engine(
                Counter(f"vllm:layer_skip_{name}", documentation, ["model_name", "engine"]), labels
            )
            for name, documentation in COUNTERS.items()
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
        if not slot or KEY not in slot:
            return
        scheduler_stats.ec_connector_stats = None
        for name, count in slot[KEY].items():
            self._counters[name][engine_idx].inc(count)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
