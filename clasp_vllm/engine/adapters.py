"""The target without its LoRA adapters: what drafts run, whichever adapter their request asks for."""

# ruff: noqa: SLF001 - views take modules apart

from __future__ import annotations

import copy

from torch import nn
from vllm.lora.layers import BaseLayerWithLoRA


def base_model(model: nn.Module) -> nn.Module:
    """``model`` with the base layer in place of each that vLLM wrapped for LoRA, sharing all else with it.

    Verification runs the adapters, so the output is theirs; drafts without them are accepted less often.
    """
    if isinstance(model, BaseLayerWithLoRA):
        base: nn.Module = model.base_layer
        return base
    if not any(isinstance(module, BaseLayerWithLoRA) for module in model.modules()):
        return model
    view = copy.copy(model)
    view._modules = {name: child and base_model(child) for name, child in model._modules.items()}
    return view
