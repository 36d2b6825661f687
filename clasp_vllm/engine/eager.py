"""The target's modules as they run best one by one, outside of the compiled graph.

Under torch.compile vLLM switches its own kernels for norms, rotary embeddings and activations off,
because the compiler fuses their native forms; on CPUs it has the kernels but never calls those for
norms and SiLU. A draft calls layers one at a time and uncompiled, where the kernels save the many small
operations of the native forms.
"""

# ruff: noqa: SLF001 - kernels and a module's dispatch have no public names

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm import ir
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.platforms import current_platform

_LIGHT_OPS = (RMSNorm, RotaryEmbeddingBase, SiluAndMul, GeluAndMul)
_VECTOR = 8  # the CPU kernels take widths that are multiples of it
_KERNELS = torch.ops._C  # vLLM's compiled operators
_IR_OPS = (ir.ops.rms_norm, ir.ops.fused_add_rms_norm)


def eager_view(module: nn.Module) -> nn.Module:
    """``module`` with vLLM's kernels switched on, sharing all parameters and buffers with it.

    The original stays as it is for the compiled graph. Attention layers are not copied: their KV cache
    is bound to them later.
    """
    if isinstance(module, AttentionLayerBase) or not any(isinstance(m, _LIGHT_OPS) for m in module.modules()):
        return module
    view = copy.copy(module)
    view._modules = {name: child and eager_view(child) for name, child in module._modules.items()}
    if isinstance(view, _LIGHT_OPS):
        assert isinstance(view, CustomOp)
        enable_kernel(view)
    return view


def enable_kernel(op: CustomOp) -> None:
    """Let ``op`` call vLLM's kernel, whatever the compiler wants of it."""
    op._enforce_enable = True
    op._forward_method = _cpu_kernel(op) or op.dispatch_forward(compile_native=False)


def _cpu_kernel(module: nn.Module) -> Callable[..., Any] | None:
    """vLLM's CPU kernel for a module that it would run in its native form, or None."""
    if not current_platform.is_cpu():
        return None
    if type(module) is RMSNorm and module.variance_size_override is None:
        return partial(_cpu_rms_norm, module)
    if type(module) is SiluAndMul and hasattr(_KERNELS, "silu_and_mul"):
        return _cpu_silu_and_mul
    return None


def _cpu_rms_norm(norm: RMSNorm, x: Tensor, residual: Tensor | None = None) -> Any:
    if x.dtype != norm.weight.dtype or not x.is_contiguous() or x.shape[-1] % _VECTOR:
        return norm.forward_native(x, residual)
    if residual is None:
        out = torch.empty_like(x)
        _KERNELS.rms_norm(out, x, norm.weight, norm.variance_epsilon)
        return out
    _KERNELS.fused_add_rms_norm(x, residual, norm.weight, norm.variance_epsilon)
    return x, residual


def _cpu_silu_and_mul(x: Tensor) -> Tensor:
    if x.shape[-1] % (2 * _VECTOR):
        return SiluAndMul.forward_native(x)
    out = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    _KERNELS.silu_and_mul(out, x)
    return out


@contextmanager
def eager_kernels() -> Iterator[None]:
    """vLLM's compiled kernels for the norms, where the platform has them."""
    with ExitStack() as stack:
        for op in _IR_OPS:
            if "vllm_c" in op.supported_providers():
                stack.enter_context(op.set_priority(["vllm_c", "native"]))
        yield
