"""The target's modules as they run best one by one, outside of the compiled graph.

Under torch.compile vLLM switches its own kernels for norms, rotary embeddings and activations off,
because the compiler fuses their native forms. A draft calls layers one at a time and uncompiled, where
those kernels save the many small operations of the native forms.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from vllm import ir
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

_LIGHT_OPS = (RMSNorm, RotaryEmbeddingBase, SiluAndMul, GeluAndMul)
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
        view._enforce_enable = True
        view._forward_method = view.dispatch_forward(compile_native=False)
    return view


@contextmanager
def eager_kernels() -> Iterator[None]:
    """vLLM's compiled kernels for the norms, where the platform has them."""
    with ExitStack() as stack:
        for op in _IR_OPS:
            if "vllm_c" in op.supported_providers():
                stack.enter_context(op.set_priority(["vllm_c", "native"]))
        yield
