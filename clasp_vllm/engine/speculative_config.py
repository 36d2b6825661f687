"""Our configuration in vLLM's terms: a draft model that is the target model itself."""

from __future__ import annotations

from typing import Any, Self

from pydantic import SkipValidation, model_validator
from vllm.config import SpeculativeConfig
from vllm.config.utils import config

from clasp_vllm.config import LayerSkipConfig


@config
class LayerSkipSpeculativeConfig(SpeculativeConfig):
    """vLLM's ``method: draft_model``, with the target as its own draft model.

    As such the scheduler reserves lookahead slots and allows async scheduling, and no second model
    is configured, downloaded or loaded. It travels to every worker inside VllmConfig; only the
    plugin reads ``layer_skip``. The compiled graph of the target does not depend on it.
    """

    layer_skip: SkipValidation[LayerSkipConfig] = None  # type: ignore[assignment]
    """The settings of the draft."""

    draft_precision: str | None = None
    """In a worker, what ``draft_weights: auto`` has come to."""

    def __post_init__(self) -> None:
        # vLLM's own __post_init__ would load the configuration of a second model.
        self.method = "draft_model"
        self.model = self.target_model_config.model
        self.draft_model_config = self.target_model_config
        self.draft_parallel_config = self.target_parallel_config
        self.draft_tensor_parallel_size = self.target_parallel_config.tensor_parallel_size

    @model_validator(mode="after")
    def _draft_is_target(self) -> Self:
        assert self.draft_model_config is self.target_model_config
        return self

    def use_ngram(self) -> bool:
        """Whether Model Runner V2 keeps the tokens of all requests on the device, to look them up."""
        return bool(self.layer_skip.ngram_cascade)

    @property
    def max_num_new_slots_for_drafting(self) -> int:
        """Our draft passes are batches of their own: the target's batch needs no room for them."""
        return 0

    def __repr__(self) -> str:
        return f"SpeculativeConfig({self.layer_skip!r})"


def layer_skip_config(vllm_config: Any) -> LayerSkipConfig | None:
    """Our settings in a VllmConfig, which may be None; None where it does not use us."""
    return getattr(getattr(vllm_config, "speculative_config", None), "layer_skip", None)
