"""Draft weights: a quantised copy of the target's linear layers and head, made while it is loaded."""

# ruff: noqa: SLF001 - views take modules apart, and torch has no public name for what it quantises

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import init_int8_linear_kernel
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.platforms import current_platform

from clasp_vllm.control.costs import measure_steps

logger = init_logger(f"vllm.{__name__}")

KEPT_AS = "layer_skip_draft"  # on a linear layer or a head


class Int8Product(Protocol):
    """A product with int8 weights, one scale for each output; inputs are quantised as they come.

    Attributes:
        largest: absolute value of a weight.
    """

    largest: int

    def __init__(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        """
        Args:
            weight: [outputs, inputs] int8.
            scale: [outputs, 1] float32.
            dtype: of inputs and outputs.
        """
        ...

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[rows, inputs] to [rows, outputs]."""
        ...


class VllmInt8:
    """vLLM's kernel for the platform. Each row of the inputs has a scale."""

    largest = 127

    def __init__(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        self._layer = nn.Module()
        self._layer.logical_widths = [len(weight)]  # type: ignore[assignment]
        self._layer.weight = nn.Parameter(weight, requires_grad=False)
        self._layer.weight_scale = nn.Parameter(scale, requires_grad=False)
        for name in ("bias", "input_scale", "input_zero_point", "azp_adj"):
            self._layer.register_parameter(name, None)
        self._kernel = init_int8_linear_kernel(
            is_channelwise=True,
            is_static_input_scheme=False,
            input_symmetric=True,
            module_name="draft weights",
        )
        self._kernel.process_weights_after_loading(self._layer)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self._kernel.apply_weights(self._layer, x, bias)


class TorchInt8:
    """PyTorch's kernel for x86 CPUs (FBGEMM). All rows of the inputs have one scale.

    For CPUs without VNNI, where vLLM's is a product of oneDNN that is slower than the target's. FBGEMM adds
    two products of an 8-bit input and a weight in 16 bits there, which weights of up to 64 keep from
    overflowing. (Inputs of 7 bits would too, and are less exact.)
    """

    largest = 64

    def __init__(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        scales, zeros = scale.flatten().double(), torch.zeros(len(weight), dtype=torch.int64)
        with warnings.catch_warnings():  # deprecated; the packed weight is not, and is made of nothing else
            warnings.simplefilter("ignore", UserWarning)
            quantised = torch._make_per_channel_quantized_tensor(weight, scales, zeros, 0)
        self._packed = torch.ops.quantized.linear_prepack(quantised, None)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out = torch.ops.quantized.linear_dynamic(x.float(), self._packed, reduce_range=False).to(x.dtype)
        return out if bias is None else out + bias


class DraftLinear(LinearMethodBase):
    """What a linear layer or a head computes in a draft."""

    def __init__(self, make: type[Int8Product]) -> None:
        self._make = make
        self.num_bytes = 0

    def load(self, weight: Tensor) -> None:
        """Take a copy of the layer's weight, [outputs, inputs]."""
        largest = self._make.largest
        scale = weight.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / largest
        quantised = (weight / scale).round_().clamp_(-largest, largest).to(torch.int8)
        self._product = self._make(quantised, scale, weight.dtype)
        self.num_bytes = quantised.nbytes + scale.nbytes

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """There is nothing to load."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """See ``LinearMethodBase``."""
        return self._product(x, bias)


def keep_draft_weight(layer: nn.Module) -> None:
    """Quantise a linear layer or a head for drafts. To be called before vLLM packs its weight or drops it."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if weight.ndim != 2 or weight.is_meta:
        return
    draft = _kept(layer)
    if draft is None:
        draft = DraftLinear(int8_product(weight))
        setattr(layer, KEPT_AS, draft)
    draft.load(weight.detach())


_fastest: dict[torch.dtype, type[Int8Product]] = {}


def int8_product(weight: Tensor) -> type[Int8Product]:
    """The fastest kernel here for one row, by trying each once for every dtype."""
    if current_platform.is_cpu() and "fbgemm" in torch.backends.quantized.supported_engines:
        if weight.dtype not in _fastest:
            kernels: tuple[type[Int8Product], ...] = VllmInt8, TorchInt8
            _fastest[weight.dtype] = min(kernels, key=lambda make: _seconds(make, weight))
            logger.info_once("Layer skipping: int8 draft weights by %s", _fastest[weight.dtype].__name__)
        return _fastest[weight.dtype]
    return VllmInt8


def _seconds(make: type[Int8Product], weight: Tensor) -> float:
    """Of a product of one row."""
    outputs, inputs = weight.shape
    product = make(torch.ones(outputs, inputs, dtype=torch.int8), torch.ones(outputs, 1), weight.dtype)
    x = torch.ones(1, inputs, dtype=weight.dtype)
    return measure_steps({1: lambda: product(x, None)}, x.device)[0]


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
    return sum(kept.num_bytes for kept in map(_kept, model.modules()) if kept is not None)


def _kept(module: nn.Module) -> DraftLinear | None:
    return vars(module).get(KEPT_AS)
