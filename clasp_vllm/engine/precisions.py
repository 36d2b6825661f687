"""Linear products with quantised weights, by vLLM's kernels: one class for each precision."""

# ruff: noqa: SLF001 - torch has no public name for what it quantises

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.kernels.linear import (
    CutlassInt8ScaledMMLinearKernel,
    MPLinearLayerConfig,
    TritonInt8ScaledMMLinearKernel,
    choose_mp_linear_kernel,
    init_fp8_linear_kernel,
    init_int8_linear_kernel,
)
from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    get_fp8_min_max,
    kFp8DynamicTokenSym,
    kFp8StaticChannelSym,
    pack_quantized_values_into_int32,
    quantize_weights,
)
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

from clasp_vllm.control.costs import measure_steps
from clasp_vllm.engine.eager import enable_kernel

logger = init_logger(f"vllm.{__name__}")

INT4 = scalar_types.uint4b8
ROWS = 1024  # of a weight, to quantise at a time: copies of a large one might not fit


class Product(Protocol):
    """A product with a quantised weight.

    Attributes:
        num_bytes: of the weight and its scales.
    """

    num_bytes: int

    def __init__(self, group_size: int) -> None:
        """``group_size``: inputs that share a scale; of int4 alone."""
        ...

    def load(self, weight: Tensor) -> None:
        """Keep a quantised copy of [outputs, inputs]; of a later one at the same addresses: graphs read them.

        Raises:
            ValueError: vLLM has no kernel for this shape.
        """
        ...

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[rows, inputs] to [rows, outputs], of the weight's dtype."""
        ...


class _KernelProduct:
    """By a kernel of vLLM, which finds what it needs in a module."""

    num_bytes = 0
    in_16_bits = False  # on CPUs too

    def __init__(self, group_size: int = 0) -> None:
        self._group_size = group_size
        self._layer = nn.Module()
        self._kernel: Any = None

    def load(self, weight: Tensor) -> None:
        self._dtype = _computed_in(weight.dtype, self.in_16_bits)
        if self._kernel is None:
            self._kernel = self._choose_kernel(weight)
            for part in vars(self._kernel).values():  # which quantise inputs
                if isinstance(part, CustomOp):
                    enable_kernel(part)
        layer = self._quantise(weight)
        _describe(layer, weight, self._dtype)
        self.num_bytes = sum(parameter.nbytes for parameter in layer.parameters())
        held = {name: of for name, of in vars(self._kernel).items() if isinstance(of, Tensor)}
        self._kernel.process_weights_after_loading(layer)
        for name, tensor in held.items():  # Humming's locks, which graphs hold too
            setattr(self._kernel, name, tensor.copy_(getattr(self._kernel, name)))
        if getattr(self._layer, "weight", None) is None:  # the first, or kept in the kernel, as by oneDNN
            self._layer = layer
            return
        new = dict(layer.named_parameters())
        for name, parameter in self._layer.named_parameters():
            parameter.data.copy_(new[name])

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        # Some kernels take the bias in an order of their own, which is not the target's.
        out: Tensor = self._kernel.apply_weights(self._layer, x.to(self._dtype), None)
        out = out.to(x.dtype)
        return out if bias is None else out + bias

    def _quantise(self, weight: Tensor) -> nn.Module:
        """The module that the kernel takes."""
        raise NotImplementedError

    def _choose_kernel(self, weight: Tensor) -> Any:
        raise NotImplementedError


class Int8(_KernelProduct):
    """A scale for each output. Inputs are quantised as they come, with a scale for each row."""

    def _quantise(self, weight: Tensor) -> nn.Module:
        return _module(*quantise(weight, 127, torch.int8), "input_zero_point", "azp_adj")

    def _choose_kernel(self, weight: Tensor) -> Any:
        kernel = init_int8_linear_kernel(
            is_channelwise=True, is_static_input_scheme=False, input_symmetric=True, module_name="drafts"
        )
        # vLLM selects CUTLASS on every NVIDIA GPU, but from Blackwell on its int8 product raises.
        if type(kernel) is CutlassInt8ScaledMMLinearKernel and current_platform.has_device_capability(100):
            kernel = TritonInt8ScaledMMLinearKernel(kernel.config, kernel.layer_param_names)
        return kernel


class TorchInt8:
    """PyTorch's kernel for x86 CPUs (FBGEMM). All rows of the inputs have one scale.

    For CPUs without VNNI, where vLLM's is a product of oneDNN that is slower than the target's. FBGEMM adds
    two products of an 8-bit input and a weight in 16 bits there, which weights of up to 64 keep from
    overflowing. (Inputs of 7 bits would too, and are less exact.)
    """

    num_bytes = 0

    def __init__(self, group_size: int = 0) -> None:
        """``group_size`` is for others."""

    def load(self, weight: Tensor) -> None:
        """See ``Product``. Nothing reads the packed weight by its address."""
        quantised, scale = quantise(weight, 64, torch.int8)
        self.num_bytes = quantised.nbytes + scale.nbytes
        scales, zeros = scale.flatten().double(), torch.zeros(len(weight), dtype=torch.int64)
        with warnings.catch_warnings():  # deprecated; the packed weight is not, and is made of nothing else
            warnings.simplefilter("ignore", UserWarning)
            tensor = torch._make_per_channel_quantized_tensor(quantised, scales, zeros, 0)
        self._packed = torch.ops.quantized.linear_prepack(tensor, None)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out = torch.ops.quantized.linear_dynamic(x.float(), self._packed, reduce_range=False).to(x.dtype)
        return out if bias is None else out + bias


class Fp8(_KernelProduct):
    """E4M3, a scale for each output. Inputs are quantised as they come, with a scale for each row."""

    def _quantise(self, weight: Tensor) -> nn.Module:
        quantised, scale = quantise(weight, get_fp8_min_max()[1], current_platform.fp8_dtype())
        return _module(quantised.t(), scale, "input_scale_ub")

    def _choose_kernel(self, weight: Tensor) -> Any:
        return _fp8_kernel((weight.shape[0], weight.shape[1]), self._dtype)


class Int4(_KernelProduct):
    """A scale for each group of inputs of an output. Inputs stay as they are."""

    in_16_bits = True

    def _quantise(self, weight: Tensor) -> nn.Module:
        outputs, inputs = weight.shape
        packed = torch.empty(outputs, inputs // 8, dtype=torch.int32, device=weight.device)
        scale = torch.empty(outputs, inputs // self._group_size, dtype=self._dtype, device=weight.device)
        for start in range(0, outputs, ROWS):
            rows = slice(start, start + ROWS)
            _, quantised, factor, _ = quantize_weights(weight[rows].t(), INT4, self._group_size)
            packed[rows] = pack_quantized_values_into_int32(quantised.t().contiguous(), INT4, packed_dim=1)
            scale[rows] = factor.t()
        # As in a checkpoint of compressed-tensors, which all kernels take.
        dims: dict[str, Any] = {"input_dim": 1, "output_dim": 0, "weight_loader": None}
        layer = nn.Module()
        layer.weight = PackedvLLMParameter(data=packed, packed_dim=1, packed_factor=8, **dims)
        layer.weight_scale = GroupQuantScaleParameter(data=scale, **dims)
        for name in ("bias", "weight_zero_point"):
            layer.register_parameter(name, None)
        return layer

    def _choose_kernel(self, weight: Tensor) -> Any:
        of = _int4_config(weight.shape[1], weight.shape[0], self._dtype, self._group_size)
        return choose_mp_linear_kernel(of)(of, "weight", "weight_scale", "weight_zero_point")


def _module(weight: Tensor, scale: Tensor, *absent: str) -> nn.Module:
    """What kernels for 8 bits take; ``absent``: parameters that they ask for."""
    layer = nn.Module()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.weight_scale = nn.Parameter(scale, requires_grad=False)
    for name in ("bias", "input_scale", *absent):
        layer.register_parameter(name, None)
    return layer


def _describe(layer: Any, weight: Tensor, dtype: torch.dtype) -> None:
    """Say of a module what kernels may ask of a linear layer."""
    outputs, inputs = weight.shape
    layer.input_size = layer.input_size_per_partition = inputs
    layer.output_size = layer.output_size_per_partition = outputs
    layer.logical_widths = layer.output_partition_sizes = [outputs]
    layer.orig_dtype = layer.params_dtype = dtype
    layer.weight_block_size, layer.has_bias = None, False


def _computed_in(dtype: torch.dtype, in_16_bits: bool) -> torch.dtype:
    """Kernels for GPUs compute in 16 bits, and on CPUs some."""
    in_16_bits |= not current_platform.is_cpu()
    return torch.bfloat16 if dtype == torch.float32 and in_16_bits else dtype


def _fp8_kernel(shape: tuple[int, int], dtype: torch.dtype) -> Any:
    return init_fp8_linear_kernel(
        activation_quant_key=kFp8DynamicTokenSym,
        weight_quant_key=kFp8StaticChannelSym,
        weight_shape=shape,
        input_dtype=dtype,
        out_dtype=dtype,
        module_name="drafts",
    )


def _int4_config(inputs: int, outputs: int, dtype: torch.dtype, group_size: int) -> MPLinearLayerConfig:
    """What vLLM chooses a kernel by."""
    return MPLinearLayerConfig(
        full_weight_shape=(inputs, outputs),
        partition_weight_shape=(inputs, outputs),
        weight_type=INT4,
        act_type=dtype,
        group_size=group_size,
        zero_points=False,
    )


def quantise(weight: Tensor, largest: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[outputs, inputs] to values of ``dtype`` up to ``largest``, and the [outputs, 1] float32 scales."""
    quantised = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    scale = torch.empty(len(weight), 1, device=weight.device, dtype=torch.float32)
    for start in range(0, len(weight), ROWS):
        of, into, factor = (tensor[start : start + ROWS] for tensor in (weight, quantised, scale))
        factor.copy_(of.abs().amax(1, keepdim=True)).clamp_(min=1e-12).div_(largest)
        values = of / factor
        if not dtype.is_floating_point:
            values.round_()
        into.copy_(values.clamp_(-largest, largest))
    return quantised, scale


def product_of(precision: str, weight: Tensor, head: bool, group_size: int) -> type[Product]:
    """The class for a linear layer or a head.

    Args:
        precision: int8, fp8 or int4. A head loses more by 4 bits than it saves and gets 8. So does a weight
            of a shape that kernels for 4 bits do not take.
    """
    if precision == "int4" and not head:
        reason = unavailable(precision, weight.dtype, group_size, (weight.shape[0], weight.shape[1]))
        if reason is None:
            return Int4
        logger.info_once("Layer skipping: weights of %s get 8 bits, not 4: %s", tuple(weight.shape), reason)
    if precision == "fp8" or (precision == "int4" and current_platform.is_cuda_alike()):
        return Fp8
    return fastest_int8(weight)


_fastest: dict[torch.dtype, type[Product]] = {}


def fastest_int8(weight: Tensor) -> type[Product]:
    """The fastest kernel here for one row, by trying each once for every dtype."""
    if not current_platform.is_cpu() or "fbgemm" not in torch.backends.quantized.supported_engines:
        return Int8
    if weight.dtype not in _fastest:
        kernels: tuple[type[Product], ...] = Int8, TorchInt8
        _fastest[weight.dtype] = min(kernels, key=lambda kernel: _seconds(kernel, weight))
        logger.info_once("Layer skipping: int8 draft weights by %s", _fastest[weight.dtype].__name__)
    return _fastest[weight.dtype]


def _seconds(kernel: type[Product], weight: Tensor) -> float:
    """Of a product of one row."""
    product, x = kernel(0), weight.new_ones(1, weight.shape[1])
    product.load(weight)
    return measure_steps({1: lambda: product(x, None)}, x.device)[0]


def unavailable(
    precision: str, dtype: torch.dtype, group_size: int, shape: tuple[int, int] = (1024, 1024)
) -> str | None:
    """Why there is no kernel for a precision here; None: there is one. Touches no GPU.

    ``shape``: outputs and inputs of the weight.
    """
    outputs, inputs = shape
    dtype = _computed_in(dtype, precision == "int4" and Int4.in_16_bits)
    try:
        if precision == "int4":
            if inputs % group_size:
                return f"draft_weights_group_size: {group_size} does not divide {inputs} inputs"
            of = _int4_config(inputs, outputs, dtype, group_size)
            kernel = choose_mp_linear_kernel(of)
            if kernel is CPUWNA16LinearKernel and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
                return "vLLM's kernel for CPUs needs AVX-512"
        elif precision == "fp8":
            with set_current_vllm_config(VllmConfig()):
                _fp8_kernel(shape, dtype)
    except ValueError as error:
        return str(error)
    return None
