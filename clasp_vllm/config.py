"""The speculative configuration: what a user may write, its checks and its meaning.

Nothing here imports vLLM, so that a bad configuration is refused before anything is loaded.
"""

from __future__ import annotations

import difflib
import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


@dataclass(frozen=True)
class Method:
    """What the keys mean for a method.

    Attributes:
        adaptive: whether a controller chooses what is left open, by default.
        passes: whether it chooses layers anew by optimisation passes.
    """

    adaptive: bool
    passes: bool


METHODS = {
    "clasp": Method(adaptive=True, passes=True),
    "knn_ssd": Method(adaptive=True, passes=False),
    "layer_skip": Method(adaptive=False, passes=False),
}
REMOVED_METHODS = {"swift": "it was slower than plain decoding"}  # and why
REMOVED_KEYS = {
    "granularity": "masks of sub-layers were accepted less often than masks of layers; leave it out",
}
# Keys that belong to some methods only.
METHODS_OF_KEY = {
    "skip_ratio": ("clasp", "layer_skip"),
    "num_skipped_layers": ("clasp", "layer_skip"),
    "skip_layers": ("layer_skip",),
    "calibration": ("knn_ssd",),
    "optimization_interval": ("clasp",),
    "max_optimized_requests": ("clasp",),
    "mask_memory": ("clasp",),
}
LARGEST_SKIP_RATIO = 2 / 3  # where the controller chooses
# What the controller chooses: how many layers to skip, how far to draft, when to stop early, and whether to
# speculate at all.
CHOICES = ("layers", "length", "exit", "speculation")
EXIT_THRESHOLD = 0.3

# vLLM's own keys, passed through under their own names.
VLLM_KEYS = (
    "num_speculative_tokens",
    "num_speculative_tokens_per_batch_size",
    "draft_sample_method",
    "rejection_sample_method",
    "synthetic_acceptance_rates",
    "synthetic_acceptance_length",
    "prompt_lookup_min",
    "prompt_lookup_max",
)


# Values in messages are cut: a few lines of YAML can stand for gigabytes.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 3, 8, 8, 200, 200


class ConfigError(ValueError):
    """A speculative configuration that cannot be used. The message is for the user."""


class LayerSkipConfig(BaseModel):
    """Self-speculative decoding by skipping layers of the target model."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    method: Literal["clasp", "knn_ssd", "layer_skip"] = Field(
        description="clasp: layers chosen in context by dynamic programming (arXiv 2505.24196); "
        "knn_ssd: sub-layers chosen by what a prompt is nearest to (arXiv 2505.16162), from a calibration; "
        "layer_skip: a fixed set of layers for all requests."
    )
    num_speculative_tokens: int = Field(
        default=8, ge=1, le=64, description="Draft tokens per round at most (vLLM's key)."
    )
    adaptive: bool | list[Literal["layers", "length", "exit", "speculation"]] | None = Field(
        default=None,
        description="Choose in each round how many layers to skip, how far to draft, when to "
        "stop early, and whether to speculate at all, by what has been accepted and "
        "what it costs (default for clasp and knn_ssd: true). What is fixed by another key stays so. "
        "A list = only what it names of layers, length, exit and speculation; "
        "false = as much as the keys say, always.",
    )
    skip_ratio: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Share of the layers to skip, rounded to whole layers. If neither this nor "
        "num_skipped_layers nor skip_layers is given: 0.5, or chosen up to two thirds if adaptive.",
    )
    num_skipped_layers: int | None = Field(
        default=None,
        ge=0,
        description="How many layers to skip, fewer than the model has. Instead of skip_ratio.",
    )
    skip_layers: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None,
        description="layer_skip only: the layers to skip, counted from 0. Without it as many layers "
        "as skip_ratio or num_skipped_layers says, evenly spaced.",
    )
    calibration: str | None = Field(
        default=None,
        description="knn_ssd only, and required there: the folder that `clasp-vllm calibrate` wrote.",
    )
    optimization_interval: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="clasp only: rounds between two choices of a request's layers (default 32, or chosen "
        "if adaptive).",
    )
    max_optimized_requests: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="clasp only: how many requests may have their layers chosen in one step "
        "(default 4). Each holds back num_skipped_layers blocks of KV cache.",
    )
    mask_memory: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="clasp only: how much the choices of earlier passes count in the next (default 0.9); "
        "0 = each choice goes by one token alone, as in the paper.",
    )
    ngram_cascade: bool | None = Field(
        default=None,
        description="Where a request's last tokens occurred in it before, verify what followed them there in "
        "the place of drafts by skipping, if that promises more (vLLM's n-gram lookup). Needs adaptive. By "
        "default on with Model Runner V1 on a CPU without async scheduling, and off with Model Runner V2.",
    )
    prompt_lookup_min: int = Field(
        default=2, ge=1, le=64, description="For ngram_cascade: the fewest tokens to look up (vLLM's key)."
    )
    prompt_lookup_max: int = Field(
        default=4, ge=1, le=64, description="For ngram_cascade: the most tokens to look up (vLLM's key)."
    )
    draft_exit_threshold: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Stop drafting for a request after a token less probable than this under the "
        f"draft; 0 = off (default {EXIT_THRESHOLD}, or chosen if adaptive).",
    )
    num_speculative_tokens_per_batch_size: list[list[int]] | None = Field(
        default=None,
        description="Draft length by batch size: triples of first and last batch size and draft length "
        "(vLLM's key).",
    )
    draft_sample_method: Literal["greedy", "probabilistic"] | None = Field(
        default=None,
        description="How draft tokens of sampling requests are drawn (vLLM's key). Default: probabilistic on "
        "CPUs with Model Runner V1, else greedy as in vLLM.",
    )
    rejection_sample_method: Literal["standard", "synthetic", "block"] = Field(
        default="standard", description="How drafts are verified (vLLM's key)."
    )
    synthetic_acceptance_rates: list[Annotated[float, Field(ge=0, le=1)]] | None = Field(
        default=None, description="Acceptance by position, for synthetic verification (vLLM's key)."
    )
    synthetic_acceptance_length: float | None = Field(
        default=None, ge=1, description="Mean accepted length, for synthetic verification (vLLM's key)."
    )

    @model_validator(mode="after")
    def _consistent(self) -> LayerSkipConfig:
        budgets = [
            k for k in ("skip_ratio", "num_skipped_layers", "skip_layers") if getattr(self, k) is not None
        ]
        if len(budgets) > 1:
            raise ValueError(f"{' and '.join(budgets)} exclude each other; give one of them")
        for key, allowed in METHODS_OF_KEY.items():
            if getattr(self, key) is not None and self.method not in allowed:
                raise ValueError(
                    f"{key}={getattr(self, key)!r} is only allowed with method: {' or '.join(allowed)}, "
                    f"not with method: {self.method}"
                )
        if self.method == "knn_ssd" and self.calibration is None:
            raise ValueError("calibration=None: method: knn_ssd needs the folder of a calibration")
        for choice, why in self._fixed().items():
            if isinstance(self.adaptive, list) and choice in self.adaptive:
                raise ValueError(f"adaptive={self.adaptive!r}: {choice} cannot be chosen, for {why}")
        if self.ngram_cascade and not self.is_adaptive:
            raise ValueError("ngram_cascade=True needs adaptive: true")
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min={self.prompt_lookup_min} is more than "
                f"prompt_lookup_max={self.prompt_lookup_max}"
            )
        if self.skip_layers is not None and len(set(self.skip_layers)) < len(self.skip_layers):
            raise ValueError(f"skip_layers={self.skip_layers!r} names a layer twice")
        return self

    def budget(self, num_layers: int) -> int:
        """The number of layers to skip in a model of ``num_layers``; the most, where it is chosen.

        Raises:
            ConfigError: not smaller than the number of layers, or a layer that does not exist.
        """
        if self.skip_layers is not None:
            beyond = [layer for layer in self.skip_layers if layer >= num_layers]
            if beyond:
                raise ConfigError(
                    f"skip_layers: {beyond[0]} is not a layer of the model; allowed are 0 to {num_layers - 1}"
                )
            budget = len(self.skip_layers)
            key = "skip_layers"
        elif self.num_skipped_layers is not None:
            budget, key = self.num_skipped_layers, "num_skipped_layers"
        else:
            ratio = self.skip_ratio
            if ratio is None:
                ratio = LARGEST_SKIP_RATIO if self.chooses_budget else 0.5
            budget, key = round(ratio * num_layers), "skip_ratio"
            if self.skip_ratio is None:
                budget = min(budget, num_layers - 1)
        if budget >= num_layers:
            raise ConfigError(
                f"{key}: skipping {budget} layers leaves none; the model has {num_layers}, "
                f"allowed are 0 to {num_layers - 1} skipped layers"
            )
        return budget

    @property
    def is_adaptive(self) -> bool:
        """Whether a controller chooses what the configuration leaves open."""
        return METHODS[self.method].adaptive if self.adaptive is None else self.adaptive is not False

    @property
    def open_choices(self) -> frozenset[str]:
        """What the controller chooses, of ``CHOICES``."""
        if not self.is_adaptive:
            return frozenset()
        choices = self.adaptive if isinstance(self.adaptive, list) else CHOICES
        return frozenset(choices) - self._fixed().keys()

    def _fixed(self) -> dict[str, str]:
        """What cannot be chosen, and why."""
        reasons = {}
        if not METHODS[self.method].passes:
            reasons["layers"] = f"method: {self.method} fixes them"
        for key in ("skip_ratio", "num_skipped_layers", "skip_layers"):
            if getattr(self, key) is not None:
                reasons["layers"] = f"{key} fixes them"
        if self.draft_exit_threshold is not None:
            reasons["exit"] = "draft_exit_threshold fixes it"
        return reasons

    @property
    def chooses_budget(self) -> bool:
        """Whether the controller chooses how many layers to skip."""
        return "layers" in self.open_choices

    @property
    def exit_threshold(self) -> float | None:
        """The probability below which drafting stops; None where the controller says when."""
        if self.draft_exit_threshold is None and "exit" not in self.open_choices:
            return EXIT_THRESHOLD
        return self.draft_exit_threshold

    @property
    def cascades(self) -> bool:
        """Whether the context is looked up where tokens are on the host; elsewhere if ``ngram_cascade``."""
        return self.is_adaptive if self.ngram_cascade is None else self.ngram_cascade

    def budgets(self, num_layers: int) -> tuple[int, ...]:
        """The numbers of layers to skip that there are to choose from, ascending."""
        most = self.budget(num_layers)
        return tuple(range(1, most + 1)) if self.chooses_budget and most else (most,)

    @property
    def interval(self) -> int | None:
        """Rounds between two optimisation passes; None for fixed masks."""
        return self.optimization_interval or 32 if METHODS[self.method].passes else None

    @property
    def optimized_requests(self) -> int:
        """How many requests may be optimised in one step."""
        return self.max_optimized_requests or 4 if METHODS[self.method].passes else 0

    @property
    def memory(self) -> float:
        """What the averages over earlier passes keep; 0 where there are none."""
        if not METHODS[self.method].passes:
            return 0.0
        return 0.9 if self.mask_memory is None else self.mask_memory

    def explain(self, num_layers: int | None = None) -> list[str]:
        """What the configuration will do, in words; some of them need the model's number of layers."""
        most = "up to " if "length" in self.open_choices else ""
        lines = [f"method: {self.method}", f"draft tokens per round: {most}{self.num_speculative_tokens}"]
        if self.calibration is not None:
            lines.append(f"layers skipped: by task, as in {self.calibration}")
        elif num_layers is not None:
            most = "up to " if self.chooses_budget else ""
            lines.append(f"layers skipped: {most}{self.budget(num_layers)} of {num_layers}")
        if self.interval is not None:
            rounds = f"every {self.interval} rounds"
            if self.is_adaptive and self.optimization_interval is None:
                rounds = "as often as it pays"
            lines.append(
                f"layers chosen anew {rounds}, for at most {self.optimized_requests} requests in one step"
            )
        threshold = self.exit_threshold
        if threshold is None:
            lines.append("drafting stops where a further token would not pay")
        elif threshold:
            lines.append(f"drafting stops below a probability of {threshold}")
        else:
            lines.append("drafting never stops early")
        if "speculation" in self.open_choices:
            lines.append("no speculation where it does not pay")
        return lines

    def vllm_settings(self) -> dict[str, Any]:
        """vLLM's own keys, for its SpeculativeConfig."""
        return {key: getattr(self, key) for key in VLLM_KEYS}


def is_ours(settings: object) -> bool:
    """Whether a speculative configuration asks for one of our methods, or uses keys only we have."""
    if not isinstance(settings, Mapping):
        return False
    own_keys = {*LayerSkipConfig.model_fields, *REMOVED_KEYS} - {"method", *VLLM_KEYS}
    return settings.get("method") in (*METHODS, *REMOVED_METHODS) or (
        settings.get("method") is None and not own_keys.isdisjoint(settings)
    )


def read_settings(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The key-value pairs of a configuration given as a mapping, as JSON or as a file's path.

    Raises:
        ConfigError: the file is missing or unreadable, or it does not hold key-value pairs.
    """
    if isinstance(source, Mapping):
        return dict(source)
    text = str(source)
    if text.lstrip().startswith(("{", "[")):
        settings, origin = _parse(text, json.loads, "the JSON given"), "the JSON given"
    else:
        path = Path(text).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"speculative configuration {text!r}: no such file; "
                "allowed is a JSON object or the path of a YAML or JSON file"
            )
        origin = f"file {text!r}"
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"speculative configuration {origin}: {error}") from error
        settings = _parse(content, yaml.safe_load, origin)
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ConfigError(
            f"speculative configuration {origin}: holds {_describe(settings)}; "
            "allowed are key-value pairs, such as `method: clasp`"
        )
    return settings


def _parse(text: str, load: Any, origin: str) -> object:
    try:
        return load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(
            f"speculative configuration {origin} cannot be read: {' '.join(str(error).split())}"
        ) from error


def _describe(value: object) -> str:
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "keys that are not text"
    return "nothing" if value is None else _SHORT.repr(value)


def parse_config(settings: Mapping[str, Any]) -> LayerSkipConfig:
    """Check the settings of one of our methods.

    Raises:
        ConfigError: names each key that is wrong, its value and what is allowed.
    """
    names = {key.replace("-", "_"): value for key, value in settings.items()}
    try:
        return LayerSkipConfig.model_validate(names)
    except ValidationError as error:
        problems = "; ".join(_explain(dict(e), names) for e in error.errors())
        raise ConfigError(f"speculative configuration: {problems}") from None


def _explain(error: dict[str, Any], settings: Mapping[str, Any]) -> str:
    if not error["loc"]:
        return str(error["msg"]).removeprefix("Value error, ")
    key = str(error["loc"][0])
    value = _SHORT.repr(settings.get(key))
    choices = settings.get(key) if key == "adaptive" else None
    if isinstance(choices, list) and "sharing" in choices:
        return (
            f"adaptive={value}: sharing was removed, for it gained nothing; allowed are {', '.join(CHOICES)}"
        )
    why = REMOVED_METHODS.get(str(settings.get(key))) if key == "method" else None
    if why is not None:
        return f"method={value} was removed, for {why}; allowed are {', '.join(METHODS)}"
    if key in REMOVED_KEYS:
        return f"{key}={value} was removed: {REMOVED_KEYS[key]}"
    if error["type"] == "extra_forbidden":
        known = list(LayerSkipConfig.model_fields)
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"unknown key {key}={value}; {hint}allowed keys: {', '.join(known)}"
    return f"{key}={value}: {str(error['msg']).lower()}"
