"""What weights of drafts are quantised to, and by which kernel. No kernel runs: GPUs' cannot exist here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.model_executor import parameter
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    pack_quantized_values_into_int32,
    quantize_weights,
)

from clasp_vllm.engine import precisions
from clasp_vllm.engine.precisions import INT4, Int4, Int8, product_of


class Kernel:
    """Stands for vLLM's kernels: takes whatever it gets, and has locks of its own, as Humming has."""

    def __init__(self, *_) -> None:
        self.locks = None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.locks = torch.zeros(4)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    """vLLM's parameters ask for it, and there is no engine."""
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)


@pytest.fixture
def int4_kernel(monkeypatch):
    monkeypatch.setattr(precisions, "choose_mp_linear_kernel", lambda config: Kernel)


@pytest.fixture
def int8(monkeypatch) -> type:
    """What weights of 8 bits are here, untried."""
    monkeypatch.setattr(precisions, "fastest_int8", lambda weight: Int8)
    return Int8


def refuse(config) -> type:
    raise ValueError("no such shape")


def test_groups_that_do_not_divide_the_inputs_leave_a_weight_at_8_bits(int4_kernel, int8):
    weight = torch.randn(32, 96)  # as of one rank of many
    assert product_of("int4", weight, False, 32) is Int4
    assert product_of("int4", weight, False, 64) is int8
    assert product_of("int4", weight[:, :32], False, 64) is int8  # fewer than a group


def test_a_shape_without_an_int4_kernel_leaves_a_weight_at_8_bits(monkeypatch, int8):
    weight = torch.randn(33, 64)
    monkeypatch.setattr(precisions, "choose_mp_linear_kernel", refuse)
    assert product_of("int4", weight, False, 64) is int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_takes_some_rows_at_a_time(int4_kernel, monkeypatch, dtype):
    """And gets what all at once give: a float32 copy of a whole head of 8 billion parameters takes 2 GB."""
    torch.manual_seed(0)
    weight, rows = torch.randn(20, 64, dtype=dtype), []

    def counted(some, *args):
        rows.append(some.shape[1])
        return quantize_weights(some, *args)

    monkeypatch.setattr(precisions, "ROWS", 8)
    monkeypatch.setattr(precisions, "quantize_weights", counted)
    product = Int4(32)
    product.load(weight)
    assert rows == [8, 8, 4]
    _, quantised, scale, _ = quantize_weights(weight.t(), INT4, 32)
    packed = pack_quantized_values_into_int32(quantised.t().contiguous(), INT4, packed_dim=1)
    assert torch.equal(product._layer.weight, packed)
    assert torch.equal(product._layer.weight_scale, scale.t().bfloat16())  # kernels compute in 16 bits


def test_what_a_kernel_holds_stays_where_it_is_when_weights_are_reloaded(int4_kernel):
    product = Int4(32)
    product.load(torch.randn(8, 64))
    locks = product._kernel.locks
    locks.fill_(7)  # as memory that has come back from sleep
    product.load(torch.randn(8, 64))
    assert product._kernel.locks is locks
    assert not locks.any()


@pytest.mark.parametrize(("capability", "expected"), [(90, "Cutlass"), (100, "Triton"), (120, "Triton")])
def test_int8_is_not_by_cutlass_where_that_has_no_such_product(monkeypatch, capability, expected):
    """From Blackwell on it raises at the first product, though vLLM selects it."""
    cutlass = object.__new__(precisions.CutlassInt8ScaledMMLinearKernel)
    cutlass.config, cutlass.layer_param_names = SimpleNamespace(), ("weight",)
    platform = SimpleNamespace(has_device_capability=lambda least: capability >= least)
    monkeypatch.setattr(precisions, "current_platform", platform)
    monkeypatch.setattr(precisions, "init_int8_linear_kernel", lambda **_: cutlass)
    monkeypatch.setattr(
        precisions.TritonInt8ScaledMMLinearKernel, "is_supported", classmethod(lambda cls: (True, None))
    )
    kernel = Int8()._choose_kernel(torch.randn(16, 16))
    assert type(kernel).__name__ == f"{expected}Int8ScaledMMLinearKernel"
    assert (kernel.config, kernel.layer_param_names) == (cutlass.config, cutlass.layer_param_names)
