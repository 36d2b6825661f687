"""Products with weights as they are and quantised as for drafts. Runs in the process of an engine."""

from __future__ import annotations

import traceback
from functools import partial
from typing import Any

from gpu.engines import BATCHES
from gpu.timing import in_graph

SHAPES = {
    "qkv": (4096, 6144),
    "o": (4096, 4096),
    "gate_up": (4096, 28672),
    "down": (14336, 4096),
    "head": (4096, 128256),
}
GROUP_SIZE = 64  # the default of draft_weights_group_size


def kernels(llm: Any, name: str) -> dict[str, Any]:
    """Microseconds of the products of one shape of Llama-3-8B, by rows; of the head with 16 and 8 bits."""
    import torch
    from vllm.config import set_current_vllm_config

    from clasp_vllm.engine.auto_precision import copies_beyond_caches, quantised_copies
    from clasp_vllm.engine.precisions import Fp8, Int4, Int8

    results: dict[str, Any] = {}
    inputs, outputs = SHAPES[name]
    weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) / 64
    inputs_of = {rows: torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16) for rows in BATCHES}
    kinds = {"bf16": None, "fp8": Fp8, "int8": Int8, "int4": Int4}
    with torch.inference_mode(), set_current_vllm_config(llm.llm_engine.vllm_config):
        for precision, kind in kinds.items():
            if precision == "int4" and name == "head":
                continue
            try:
                products: list[Any]
                if kind is None:
                    copies = copies_beyond_caches(weight.nbytes)
                    products = [
                        partial(torch.nn.functional.linear, weight=weight.clone()) for _ in range(copies)
                    ]
                else:
                    products = quantised_copies(kind, weight, GROUP_SIZE)
                    results[f"{precision} by"] = type(products[0]._kernel).__name__  # noqa: SLF001
                    products = [partial(product, bias=None) for product in products]
                for rows, x in inputs_of.items():
                    results[f"{precision} {rows}"] = in_graph([partial(product, x) for product in products])
                del products
            except Exception:
                results[precision] = traceback.format_exc()
    return results
