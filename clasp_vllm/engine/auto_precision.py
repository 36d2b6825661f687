"""``draft_weights: auto``: the precision that promises most on this device, by timing its products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import ceil

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.logger import init_logger

from clasp_vllm.control.costs import Array, measure_steps
from clasp_vllm.control.planner import WORTH_IT
from clasp_vllm.engine.precisions import Product, product_of, unavailable

logger = init_logger(f"vllm.{__name__}")

# How often a draft's token is the target's, of a model of 135 million parameters
# (docs/methods/draft_weights.md). Larger models agree more often.
AGREEMENT = {"int8": 0.92, "fp8": 0.94, "int4": 0.79}
BYTES = {"int8": 1.0, "fp8": 1.0, "int4": 0.54}  # of a weight with its share of the scales
LONGEST = 8  # draft tokens
SHARE = 0.5  # of the memory that is left for the KV cache, what draft weights may take
REPEATS = 8  # of a product at least, so that its launch does not count,
CACHES = 256 << 20  # and with copies of a weight that take more bytes than caches hold together,
MOST_COPIES = 32  # unless it is small: a step reads all other layers before it comes to the same one


def auto_precision(vllm_config: VllmConfig, group_size: int, device: torch.device) -> str:
    """int8, fp8, int4, or target where none promises enough or fits; the same on all ranks.

    Chosen for the engine's first layer: what is free then is what draft weights may take a share of.
    """
    speculative_config = vllm_config.speculative_config
    if speculative_config.draft_precision is None:
        speculative_config.draft_precision = _choose(vllm_config, group_size, device)
    return str(speculative_config.draft_precision)


def _choose(vllm_config: VllmConfig, group_size: int, device: torch.device) -> str:
    model, ranks = vllm_config.model_config, vllm_config.parallel_config.tensor_parallel_size
    if model.quantization is not None or model.is_moe:
        kind = "a mixture of experts" if model.is_moe else "quantised"
        logger.info_once("Layer skipping: draft_weights: auto takes target, for the model is %s", kind)
        return "target"
    text, hidden = model.hf_text_config, model.get_hidden_size()
    width = text.intermediate_size // ranks
    heads = model.get_num_attention_heads(vllm_config.parallel_config)
    heads += model.get_num_kv_heads(vllm_config.parallel_config)
    layers = model.get_num_layers(vllm_config.parallel_config)
    parameters = hidden * (layers * (2 * heads * model.get_head_size() + 3 * width))
    parameters += hidden * model.get_vocab_size() // ranks
    left = _memory_left(vllm_config.cache_config.gpu_memory_utilization)
    fitting = tuple(name for name, size in BYTES.items() if parameters * size <= SHARE * left)
    if len(fitting) < len(BYTES):
        without = ", ".join(BYTES.keys() - set(fitting))
        logger.info_once(
            "Layer skipping: draft_weights: auto leaves out %s: too little memory is left", without
        )
    weight = torch.randn(2 * width, hidden, dtype=model.dtype, device=device)
    return _most_promising(fitting, weight, group_size)


def _most_promising(candidates: tuple[str, ...], weight: Tensor, group_size: int) -> str:
    """By products with ``weight``: that of an MLP's first layer."""

    def rows(number: int) -> Tensor:
        return weight.new_ones(number, weight.shape[1])

    target = [
        partial(nn.functional.linear, weight=weight.clone())
        for _ in range(copies_beyond_caches(weight.nbytes))
    ]
    verify = np.array([_seconds(target, rows(number)) for number in range(1, LONGEST + 2)])
    target.clear()
    promised = {"target": 1.0}
    for name in candidates:
        reason = unavailable(name, weight.dtype, group_size)
        try:
            if reason is None:
                products = quantised_copies(product_of(name, weight, False, group_size), weight, group_size)
                seconds = _seconds([partial(product, bias=None) for product in products], rows(1))
                promised[name] = expected_ratio(AGREEMENT[name], verify, seconds)
        except Exception as error:  # kernels tell in many ways that they cannot
            reason = repr(error)
        if reason is not None:
            logger.info_once("Layer skipping: draft_weights: auto leaves out %s: %s", name, reason)
    best = max(promised, key=promised.__getitem__)
    if promised[best] < WORTH_IT:
        best = "target"
    group = get_tp_group()
    if group.world_size > 1:
        best = group.broadcast_object(best, src=0)
    words = ", ".join(f"{name} {ratio:.2f}" for name, ratio in promised.items())
    logger.info_once("Layer skipping: draft_weights: auto takes %s, of %s times plain decoding", best, words)
    return best


def expected_ratio(acceptance: float, verify: Array, draft: float) -> float:
    """Tokens per second over plain decoding's, with the best number of draft tokens.

    Args:
        verify: seconds of a step of 1, 2, ... rows.
        draft: of a draft step.
    """
    steps = np.arange(len(verify))
    tokens = np.cumsum(acceptance**steps)
    return float((tokens * verify[0] / (verify + steps * draft)).max())


def copies_beyond_caches(num_bytes: int) -> int:
    """Of a weight of so many bytes, to be read in turn by products that are timed."""
    return min(ceil(CACHES / num_bytes), MOST_COPIES)


def quantised_copies(kind: type[Product], weight: Tensor, group_size: int) -> list[Product]:
    """Products with so many copies of [outputs, inputs] quantised."""
    products = [kind(group_size)]
    products[0].load(weight)
    for _ in range(1, copies_beyond_caches(products[0].num_bytes)):
        products.append(kind(group_size))
        products[-1].load(weight)
    return products


def _seconds(products: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> float:
    """Of one of them."""
    rounds = ceil(REPEATS / len(products))

    def repeat() -> None:
        for _ in range(rounds):
            for product in products:
                product(x)

    # Draft steps are replayed on a GPU, where calling so small a product takes longer than the product.
    run = repeat if x.device.type == "cpu" else _graph(repeat).replay
    return measure_steps({0: run}, x.device)[0] / (rounds * len(products))


def _graph(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):  # libraries are set up by work that is not captured
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def _memory_left(utilization: float) -> float:
    """Bytes, of what the engine may take."""
    if not torch.cuda.is_available():
        return float(psutil.virtual_memory().available)
    free, total = torch.cuda.mem_get_info()
    return free - (1 - utilization) * total
