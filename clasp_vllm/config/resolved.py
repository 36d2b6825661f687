"""What a configuration means for one model and engine: what a user left open has its value here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from clasp_vllm.config.schema import (
    EXIT_THRESHOLD,
    MASK_MEMORY,
    MAX_OPTIMIZED_REQUESTS,
    METHODS,
    OPTIMIZATION_INTERVAL,
    SKIP_RATIO,
    ConfigError,
    LayerSkipConfig,
)

LARGEST_SKIP_RATIO = 2 / 3  # where the controller chooses
T = TypeVar("T")


@dataclass(frozen=True)
class DraftSettings:
    """The settings of a drafter.

    Attributes:
        draft_weights: what drafts run: "target", the target's own weights, or a copy quantised to "int8",
            "fp8" or "int4"; "auto": one of them.
        budgets: numbers of layers to skip, ascending, of which the controller chooses if there are several.
            knn_ssd's skip sets come from its calibration instead.
        contexts: windows of context that drafts may attend to, in tokens, descending; None: all of it.
        skip_layers: the fixed layers to skip; None: evenly spaced to begin with.
        calibration: the folder of a calibration, or None.
        open_choices: what the controller chooses, of ``CHOICES``.
        adaptive: whether there is a controller.
        interval: rounds between two optimisation passes; None where the controller chooses, or without
            passes.
        optimized_requests: how many requests one pass chooses layers for at most; 0 without passes.
        scratch_columns: scratch blocks of a request in an optimisation pass.
        scratch_blocks: KV blocks to hold back from the scheduler.
        mask_memory: what the averages over earlier passes keep, in [0, 1).
        exit_threshold: the probability below which drafting stops; None where the controller says when.
        summary: all of this in words.
    """

    method: str
    num_speculative_tokens: int
    draft_weights: str
    budgets: tuple[int, ...]
    contexts: tuple[int | None, ...]
    skip_layers: tuple[int, ...] | None
    calibration: str | None
    open_choices: frozenset[str]
    adaptive: bool
    interval: int | None
    optimized_requests: int
    scratch_columns: int
    scratch_blocks: int
    mask_memory: float
    exit_threshold: float | None
    summary: str


def resolve(config: LayerSkipConfig, num_layers: int, max_num_seqs: int) -> DraftSettings:
    """Give every setting its value.

    Raises:
        ConfigError: as many layers are to be skipped as there are, or one that does not exist; or drafts
            might cost as much as the target, with nobody to switch them off.
    """
    most = _budget(config, num_layers)
    may_be_the_target = config.draft_weights == "auto" and config.draft_context == "full" and not most
    if may_be_the_target and "speculation" not in config.open_choices:
        raise ConfigError(
            "draft_weights='auto' may come to the target's own weights, with which drafts that skip no layer "
            "gain nothing: set adaptive: true, or a precision, or layers to skip"
        )
    least = 0 if config.drafts_with_all_layers else 1
    columns = most + config.drafts_with_all_layers  # of a pass, but for one that is the target itself
    passes = METHODS[config.method].passes
    optimized = min(_optimized_requests(config), max_num_seqs)
    return DraftSettings(
        method=config.method,
        num_speculative_tokens=config.num_speculative_tokens,
        draft_weights=config.draft_weights,
        budgets=tuple(range(least, most + 1)) if config.chooses_budget and most else (most,),
        contexts=config.contexts,
        skip_layers=None if config.skip_layers is None else tuple(config.skip_layers),
        calibration=config.calibration,
        open_choices=config.open_choices,
        adaptive=config.is_adaptive,
        interval=_interval(config),
        optimized_requests=optimized,
        scratch_columns=columns,
        scratch_blocks=max(optimized * columns, int(config.is_adaptive)),  # costs are measured in one
        mask_memory=_or_default(config.mask_memory, MASK_MEMORY) if passes else 0.0,
        exit_threshold=_exit_threshold(config),
        summary="; ".join(explain(config, num_layers)),
    )


def explain(config: LayerSkipConfig, num_layers: int | None = None) -> list[str]:
    """What a configuration will do, in words; some of them need the model's number of layers.

    Raises:
        ConfigError: as ``resolve``.
    """
    most = "up to " if "length" in config.open_choices else ""
    lines = [f"method: {config.method}", f"draft tokens per round: {most}{config.num_speculative_tokens}"]
    if config.calibration is not None:
        lines.append(f"layers skipped: by task, as in {config.calibration}")
    elif num_layers is not None:
        most = "up to " if config.chooses_budget else ""
        lines.append(f"layers skipped: {most}{_budget(config, num_layers)} of {num_layers}")
    if config.quantises:
        to = "what pays" if config.draft_weights == "auto" else config.draft_weights
        lines.append(f"drafts run weights quantised to {to}")
    if config.draft_context == "auto":
        lines.append("drafts attend to as much of the context as pays")
    elif config.draft_context != "full":
        lines.append(f"drafts attend to the last {config.draft_context} tokens and the first block")
    if METHODS[config.method].passes:
        interval = _interval(config)
        rounds = "as often as it pays" if interval is None else f"every {interval} rounds"
        lines.append(
            f"layers chosen again {rounds}, for at most {_optimized_requests(config)} requests in one step"
        )
    threshold = _exit_threshold(config)
    if threshold is None:
        lines.append("drafting stops where a further token would not pay")
    elif threshold:
        lines.append(f"drafting stops below a probability of {threshold}")
    else:
        lines.append("drafting never stops early")
    if "speculation" in config.open_choices:
        lines.append("no speculation where it does not pay")
    return lines


def _budget(config: LayerSkipConfig, num_layers: int) -> int:
    """The number of layers to skip; the most, where it is chosen."""
    if config.skip_layers is not None:
        beyond = [layer for layer in config.skip_layers if layer >= num_layers]
        if beyond:
            raise ConfigError(
                f"skip_layers: {beyond[0]} is not a layer of the model; allowed are 0 to {num_layers - 1}"
            )
        key, budget = "skip_layers", len(config.skip_layers)
    elif config.num_skipped_layers is not None:
        key, budget = "num_skipped_layers", config.num_skipped_layers
    elif config.skip_ratio is not None:
        key, budget = "skip_ratio", round(config.skip_ratio * num_layers)
    else:
        ratio = LARGEST_SKIP_RATIO if config.chooses_budget else SKIP_RATIO
        return min(round(ratio * num_layers), num_layers - 1)
    if budget >= num_layers:
        raise ConfigError(
            f"{key}: skipping {budget} layers leaves none; the model has {num_layers}, "
            f"allowed are 0 to {num_layers - 1} skipped layers"
        )
    return budget


def _interval(config: LayerSkipConfig) -> int | None:
    if config.is_adaptive or not METHODS[config.method].passes:
        return config.optimization_interval
    return _or_default(config.optimization_interval, OPTIMIZATION_INTERVAL)


def _optimized_requests(config: LayerSkipConfig) -> int:
    if not METHODS[config.method].passes:
        return 0
    return _or_default(config.max_optimized_requests, MAX_OPTIMIZED_REQUESTS)


def _exit_threshold(config: LayerSkipConfig) -> float | None:
    if "exit" in config.open_choices:
        return None
    return _or_default(config.draft_exit_threshold, EXIT_THRESHOLD)


def _or_default(value: T | None, default: T) -> T:
    return default if value is None else value
