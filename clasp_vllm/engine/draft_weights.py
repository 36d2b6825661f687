"""Draft weights: a quantised copy of the target's linear layers and head, made while it is loaded."""

# ruff: noqa: SLF001 - views take modules apart

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from clasp_vllm.config import ConfigError
from clasp_vllm.engine.auto_precision import auto_precision
from clasp_vllm.engine.precisions import Product, product_of
from clasp_vllm.engine.speculative_config import layer_skip_config

KEPT_AS = "layer_skip_draft"  # on a linear layer or a head


class DraftLinear(LinearMethodBase):
    """What a linear layer or a head computes in a draft."""

    def __init__(self, product: Product) -> None:
        self.product = product

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """There is nothing to load."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See ``LinearMethodBase``."""
        return self.product(x, bias)


def keep_draft_weight(layer: nn.Module, vllm_config: VllmConfig | None) -> None:
    """Quantise the weight of a linear layer or a head for drafts, before vLLM packs it or drops it.

    Args:
        layer: others are left alone.
        vllm_config: of the engine that is being built; None: only a layer that has a draft weight gets one.

    Raises:
        ConfigError: there is no memory for it, or no kernel.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if weight.ndim != 2 or weight.is_meta:
        return
    draft = _kept(layer)
    if draft is None:
        config = layer_skip_config(vllm_config)
        if config is None or vllm_config is None or not isinstance(layer, LinearBase | ParallelLMHead):
            return
        precision: str = config.draft_weights
        if precision == "auto":
            precision = auto_precision(vllm_config, config.group_size, weight.device)
        if precision == "target":
            return
        kind = product_of(precision, weight, isinstance(layer, ParallelLMHead), config.group_size)
        draft = DraftLinear(kind(config.group_size))
        setattr(layer, KEPT_AS, draft)
    try:
        draft.product.load(weight.detach())
    except Exception as error:  # kernels tell in many ways that they cannot
        raise ConfigError(
            f"draft_weights: a weight of {tuple(weight.shape)} cannot be quantised: {error!r}. Set "
            "draft_weights: target"
        ) from error


def follow_embedding(model: Any) -> None:
    """Have a head that shares the embedding's weight quantised with it: vLLM reloads that one alone."""
    embedding, head = model.model.embed_tokens, model.lm_head
    if head.weight is embedding.weight and _kept(head) is not None:
        setattr(embedding, KEPT_AS, _kept(head))


def draft_view(module: nn.Module) -> nn.Module:
    """``module`` with the draft weights that are kept in it, sharing all else with it."""
    kept = _kept(module)
    if kept is None and not any(map(_kept, module.modules())):
        return module
    view = copy.copy(module)
    if kept is not None:
        view.quant_method = kept
        return view
    view._modules = {name: child and draft_view(child) for name, child in module._modules.items()}
    return view


def draft_logits(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model's ``compute_logits`` with the draft's head."""
    view: Any = copy.copy(model)
    head_dtype = getattr(view.logits_processor, "head_dtype", None)
    if head_dtype is None or head_dtype == view.lm_head.weight.dtype:
        view._modules = {**model._modules, "lm_head": draft_view(view.lm_head)}
    return view.compute_logits


def num_bytes(model: nn.Module) -> int:
    """Memory that the draft weights take."""
    draft_weights = {kept for kept in map(_kept, model.modules()) if kept is not None}
    return sum(kept.product.num_bytes for kept in draft_weights)


def _kept(module: nn.Module) -> DraftLinear | None:
    return vars(module).get(KEPT_AS)
