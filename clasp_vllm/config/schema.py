"""The speculative configuration: what a user may write, and which keys go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


@dataclass(frozen=True)
class Method:
    """What the keys mean for a method.

    Attributes:
        adaptive: whether a controller chooses what is left open, by default.
        passes: whether it chooses layers by optimisation passes.
        needs: keys that must be given.
    """

    adaptive: bool
    passes: bool
    needs: tuple[str, ...] = ()


METHODS = {
    "clasp": Method(adaptive=True, passes=True),
    "knn_ssd": Method(adaptive=True, passes=False, needs=("calibration",)),
    "layer_skip": Method(adaptive=False, passes=False),
}
REMOVED_METHODS = {"swift": "it drafted worse than clasp on every task"}  # and why
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
# What the controller chooses: how many layers to skip, how far to draft, when to stop early, and whether to
# speculate at all.
CHOICES = ("layers", "length", "exit", "speculation")
# What holds if nothing else is said, and the controller does not choose.
SKIP_RATIO = 0.5
EXIT_THRESHOLD = 0.3
OPTIMIZATION_INTERVAL = 32  # rounds
MAX_OPTIMIZED_REQUESTS = 4
MASK_MEMORY = 0.9
DRAFT_WEIGHTS_GROUP_SIZE = 64
DRAFT_WINDOWS = (2048, 1024, 512, 256)  # tokens of context, of which draft_context: auto chooses

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
        "what it costs (default for clasp and knn_ssd: true). What other keys set is not changed. "
        "A list = only what it names of layers, length, exit and speculation; "
        "false = as much as the keys say, always.",
    )
    skip_ratio: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Share of the layers to skip, rounded to whole layers. If neither this nor "
        f"num_skipped_layers nor skip_layers is given: {SKIP_RATIO}, or chosen up to two thirds if adaptive.",
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
    draft_weights: Literal["target", "int8", "fp8", "int4", "auto"] = Field(
        default="target",
        description="The weights that drafts run. target: the target's own. Else a copy of linear layers "
        "and head, quantised when the model is loaded, so that drafts read fewer bytes, and may pay without "
        "skipping a layer. With int4 the head has 8 bits. auto: what promises most by timing kernels at the "
        "start, and fits the memory; it may be target. For dense models that are not quantised.",
    )
    draft_weights_group_size: Literal[32, 64, 128] | None = Field(
        default=None,
        description="draft_weights: int4 or auto only: how many int4 weights share a scale "
        f"(default {DRAFT_WEIGHTS_GROUP_SIZE}). Fewer are more exact, and kernels may not have them.",
    )
    draft_context: Literal["full", "auto"] | Annotated[int, Field(ge=1)] = Field(
        default="full",
        description="What drafts attend to. full: the whole context. A number: at least so many of the last "
        "tokens and the context's first block (an attention sink). auto: with adaptive, one of full and "
        f"{', '.join(map(str, DRAFT_WINDOWS))} tokens, as promises most for a batch by what it costs and how "
        "drafts are accepted. Drafts over long contexts cost less, and may pay without skipping a layer.",
    )
    calibration: str | None = Field(
        default=None,
        description="knn_ssd only, and required there: the folder that `clasp-vllm calibrate` wrote.",
    )
    optimization_interval: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="clasp only: rounds between two choices of a request's layers (default "
        f"{OPTIMIZATION_INTERVAL}, or chosen if adaptive).",
    )
    max_optimized_requests: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="clasp only: how many requests may have their layers chosen in one step "
        f"(default {MAX_OPTIMIZED_REQUESTS}). Each holds back num_skipped_layers blocks of KV cache, and one "
        "more with draft_weights or draft_context.",
    )
    mask_memory: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="clasp only: how much the choices of earlier passes count in the next (default "
        f"{MASK_MEMORY}); 0 = each choice goes by one token alone, as in the paper.",
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
        default="standard",
        description="How drafts are verified (vLLM's key). `synthetic`, for benchmarks, accepts by chance: "
        "the output is not the target's.",
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
        for choice, why in self._fixed().items():
            if isinstance(self.adaptive, list) and choice in self.adaptive:
                raise ValueError(f"adaptive={self.adaptive!r}: {choice} cannot be chosen, for {why}")
        if self.ngram_cascade and not self.is_adaptive:
            raise ValueError("ngram_cascade=True needs adaptive: true")
        if self.draft_context == "auto" and not self.is_adaptive:
            raise ValueError(
                "draft_context='auto' needs adaptive: true; allowed without are full and a number"
            )
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min={self.prompt_lookup_min} is more than "
                f"prompt_lookup_max={self.prompt_lookup_max}"
            )
        if self.skip_layers is not None and len(set(self.skip_layers)) < len(self.skip_layers):
            raise ValueError(f"skip_layers={self.skip_layers!r} names a layer twice")
        return self

    @model_validator(mode="after")
    def _has_what_its_method_needs(self) -> LayerSkipConfig:
        for key in METHODS[self.method].needs:
            if getattr(self, key) is None:
                raise ValueError(f"{key}=None: method: {self.method} needs it")
        return self

    @model_validator(mode="after")
    def _group_size_of_int4(self) -> LayerSkipConfig:
        if self.draft_weights_group_size is not None and self.draft_weights not in ("int4", "auto"):
            raise ValueError(
                f"draft_weights_group_size={self.draft_weights_group_size} is only allowed with "
                f"draft_weights: int4 or auto, not with draft_weights: {self.draft_weights}"
            )
        return self

    @property
    def quantises(self) -> bool:
        """Whether drafts run weights of their own, or may, with auto."""
        return self.draft_weights != "target"

    @property
    def contexts(self) -> tuple[int | None, ...]:
        """Windows of context, in tokens, that drafts may attend to, descending; None: all."""
        if self.draft_context == "auto":
            return None, *DRAFT_WINDOWS
        return (None if self.draft_context == "full" else self.draft_context,)

    @property
    def drafts_with_all_layers(self) -> bool:
        """Whether a draft that skips no layer may cost less than the target."""
        return self.quantises or self.draft_context != "full"

    @property
    def group_size(self) -> int:
        """Weights of int4 drafts that share a scale."""
        return self.draft_weights_group_size or DRAFT_WEIGHTS_GROUP_SIZE

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
    def cascades(self) -> bool:
        """Whether the context is looked up where tokens are on the host; elsewhere if ``ngram_cascade``."""
        return self.is_adaptive if self.ngram_cascade is None else self.ngram_cascade

    def vllm_settings(self) -> dict[str, Any]:
        """vLLM's own keys, for its SpeculativeConfig."""
        return {key: getattr(self, key) for key in VLLM_KEYS}
