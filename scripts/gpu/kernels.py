# ruff: noqa: B023 - closures are called within their loop
"""Matrix products of bfloat16, fp8 and int4 weights. Runs in the process of an engine."""

from __future__ import annotations

import traceback
from typing import Any

from gpu.engines import BATCHES
from gpu.timing import in_graph


def kernels(llm: Any) -> dict[str, Any]:
    """Microseconds of the products of one layer and of the head in the shape of Llama-3-8B, by rows."""
    import torch
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils, marlin_utils_test
    from vllm.scalar_type import scalar_types

    device, results = torch.device("cuda"), {}
    shapes = {
        "qkv": (4096, 6144),
        "o": (4096, 4096),
        "gate_up": (4096, 28672),
        "down": (14336, 4096),
        "head": (4096, 128256),
    }
    workspace = marlin_utils.marlin_make_workspace_new(device)
    for name, (k, n) in shapes.items():
        copies = max(2, int(400e6 / (k * n * 2)))  # more than the cache holds
        weights = [torch.randn(n, k, device=device, dtype=torch.bfloat16) / 64 for _ in range(copies)]
        for rows in BATCHES:
            x = torch.randn(rows, k, device=device, dtype=torch.bfloat16)
            results[f"bf16 {name} {rows}"] = in_graph(
                [lambda w=w: torch.nn.functional.linear(x, w) for w in weights]
            )
        try:
            quantised = [ops.scaled_fp8_quant(w) for w in weights]
            for rows in BATCHES:
                x = torch.randn(rows, k, device=device, dtype=torch.bfloat16)

                def product(w: torch.Tensor, scale: torch.Tensor, x: torch.Tensor = x) -> torch.Tensor:
                    a, scale_a = ops.scaled_fp8_quant(x, use_per_token_if_dynamic=True)
                    return ops.cutlass_scaled_mm(a, w.t(), scale_a, scale, torch.bfloat16)

                results[f"fp8 {name} {rows}"] = in_graph(
                    [lambda w=w, s=s: product(w, s) for w, s in quantised]
                )
            del quantised
        except Exception:
            results[f"fp8 {name}"] = traceback.format_exc()
        try:
            _, packed, scales = marlin_utils_test.marlin_quantize(
                weights[0].t().contiguous(), scalar_types.uint4b8, 128
            )
            several = [packed.clone() for _ in range(max(2, int(400e6 / packed.nbytes)))]
            zeros = marlin_utils.marlin_make_empty(device)
            for rows in BATCHES:
                x = torch.randn(rows, k, device=device, dtype=torch.bfloat16)
                results[f"int4 {name} {rows}"] = in_graph(
                    [
                        lambda q=q: marlin_utils.apply_gptq_marlin_linear(
                            x, q, scales, zeros, workspace, scalar_types.uint4b8, n, k
                        )
                        for q in several
                    ]
                )
            del several
        except Exception:
            results[f"int4 {name}"] = traceback.format_exc()
    return results
