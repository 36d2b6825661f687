#!/usr/bin/env python3
# ruff: noqa: B023 - closures are called within their loop
"""Is clasp_vllm lossless on this GPU, does it draft there, and what do the parts of a round cost?

    python scripts/gpu_check.py [--out DIR] [--seconds 420] [--only equality,speed,segments,kernels,profile]

equality  the demo model in float32 (Triton attention) and bfloat16: greedy tokens beside plain vLLM's (in
          float32 they must be identical), failures of the drafter (must be 0), drafts (must be more than 0).
speed     random weights in the shape of Llama-3-8B, bfloat16, vLLM's default compilation and CUDA graphs:
          decoded tokens per second of plain vLLM and of fixed drafts, in turn. Random weights accept
          nothing, so acceptance is vLLM's synthetic one; the costs are real.
segments  of that model: draft steps by eager calls and by CUDA graphs, the head, the engine's own steps.
kernels   one row's products in that shape: bfloat16, fp8 and int4 (Marlin), by rows.
profile   one request's rounds under torch.profiler: kernels, launches and waits.

All engines live at once, each in a process of its own, and are measured one at a time. Every result is
written as soon as it is there, so that a run cut short keeps what it found.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clasp_vllm.tools.processes import Engine, generate

PARTS = ("equality", "speed", "segments", "kernels", "profile")
LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
SMALL = LLAMA_3_8B | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}
FIXED = {"method": "clasp", "adaptive": False, "ngram_cascade": False, "draft_exit_threshold": 0}
BATCHES = (1, 8, 32)


# What runs in the process of an engine.


def segments(llm: Any, rows: int) -> dict[str, Any]:
    """Milliseconds of a draft step of all and of half of the layers, by eager calls and by CUDA graphs."""
    import torch

    from clasp_vllm.drafting.batch import DraftBatch
    from clasp_vllm.drafting.plans import Plan
    from clasp_vllm.tools import engine

    passes = engine.drafter(llm).passes
    num_layers = engine.drafter(llm).decoder.num_layers
    graphs = getattr(engine.proposer(llm), "graphs", None)
    attention, device = passes.attention, next(engine.model_runner(llm).model.parameters()).device
    results: dict[str, Any] = {"rows": rows, "graphs": 0 if graphs is None else graphs.num_graphs}
    with torch.inference_mode():
        tokens = torch.arange(rows, device=device) + 7
        positions = torch.full((rows,), attention.block_size - 1, dtype=torch.int64, device=device)
        table = torch.full((rows, 1), attention.scratch_block, dtype=torch.int32, device=device)
        lengths = torch.full((rows,), attention.block_size, dtype=torch.int32)
        batch = DraftBatch([""] * rows, tokens, positions, table, lengths)
        masks = torch.zeros(rows, num_layers, 2, dtype=torch.bool, device=device)
        masks[::2] = True

        def plan(layers: int, mixed: bool = False) -> Plan:
            return Plan(
                [(i, part, mixed) for i in range(layers) for part in (0, 1)], masks if mixed else None
            )

        for layers in (num_layers, num_layers // 2):
            one = plan(layers)
            results[f"eager_{layers}"] = milliseconds(lambda one=one: passes.draft_eagerly(batch, one), 10)
            results[f"graphs_{layers}"] = milliseconds(lambda one=one: passes.draft(batch, one))
            results[f"graphs_{layers}_host"] = host_milliseconds(lambda one=one: passes.draft(batch, one))
        if rows > 1:
            one = plan(num_layers, True)
            results[f"graphs_mixed_{num_layers}"] = milliseconds(lambda: passes.draft(batch, one))
        hidden = passes.draft(batch, plan(1)).clone()
        results["head"] = milliseconds(lambda: passes.head(hidden)[0].argmax(-1))
        results["head_eager"] = milliseconds(lambda: passes.head_eagerly(hidden)[0].argmax(-1))
        steps = getattr(engine.model_runner(llm), "cudagraph_manager", None)
        if steps is not None:
            from clasp_vllm.engine.steps import engine_steps

            results["engine_steps"] = {
                size: milliseconds(step, 10) for size, step in engine_steps(engine.model_runner(llm)).items()
            }
        if graphs is not None and rows > 1:
            results["mismatch"] = graphs.mismatch()
    return results


def milliseconds(work: Callable[[], Any], repeats: int = 30) -> float:
    """Of one call, the median with the device waited for after each."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    for repeat in range(repeats + 3):
        wait()
        began = time.perf_counter()
        work()
        wait()
        if repeat >= 3:
            times.append(time.perf_counter() - began)
    return 1000 * sorted(times)[len(times) // 2]


def host_milliseconds(work: Callable[[], Any], repeats: int = 30) -> float:
    """Of one call until it returns, the device not waited for."""
    import torch

    times = []
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    wait()
    return 1000 * sorted(times)[len(times) // 2]


def profile(llm: Any, prompts: list[list[int]], tokens: int, folder: str) -> dict[str, Any]:
    """Tables of the profiler by device and by host time, and counts per engine step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profiler(activities=activities) as seen:
        ran = generate(llm, prompts, tokens)
    averages = seen.key_averages()
    for order in ("self_device_time_total", "self_cpu_time_total"):
        table = averages.table(sort_by=order, row_limit=40, max_name_column_width=70)
        (Path(folder) / f"profile-{order}.txt").write_text(table)
    watched = (
        "cudaLaunchKernel",
        "cudaLaunchKernelExC",
        "cuLaunchKernel",
        "cuLaunchKernelEx",
        "cudaGraphLaunch",
        "cudaMemcpyAsync",
        "cudaStreamSynchronize",
        "cudaEventSynchronize",
        "cudaDeviceSynchronize",
    )
    calls = {event.key: event.count for event in averages if event.key in watched}
    host = {event.key: event.self_cpu_time_total / 1000 for event in averages if event.key in watched}
    return {"seconds": ran["seconds"], "counters": ran["counters"], "calls": calls, "host_ms": host}


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
            zeros = marlin_utils.marlin_make_empty_g_idx(device)
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


def in_graph(works: list[Callable[[], Any]]) -> float:
    """Microseconds of one of the works, all in one CUDA graph."""
    import torch

    for work in works[:2]:
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    return 1000 * milliseconds(graph.replay, 10) / len(works)


COMMANDS = {"segments": segments, "profile": profile, "kernels": kernels}


# What asks them.


def main() -> int:
    """Run the checks; 1 if something failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder for results and logs")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS)
    )
    parser.add_argument("--seconds", type=float, default=420, help="for everything")
    parser.add_argument(
        "--small", action="store_true", help="a small shape in place of Llama-3-8B's, to try this"
    )
    parser.add_argument("--engines", type=lambda text: text.split(","), help="of the shape; default all")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # greedy alone is asked for
    until = time.monotonic() + args.seconds
    import torch
    import vllm

    cuda = torch.cuda.is_available()
    card = torch.cuda.get_device_name() if cuda else "CPU"
    results: dict[str, Any] = {
        "about": {
            "card": card,
            "torch": torch.__version__,
            "vllm": vllm.__version__,
            "date": time.strftime("%F"),
        }
    }
    began = time.monotonic()

    failed: list[str] = []

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {text}", flush=True)

    def keep(part: str, name: str, result: Any) -> Any:
        results.setdefault(part, {})[name] = result
        (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        if isinstance(result, dict) and "error" in result:
            failed.append(name)
            say(f"{part} {name}: FAILED\n{result['error'][-1500:]}")
        return result

    say(f"{card}, torch {torch.__version__}, vLLM {vllm.__version__}")
    equality = start_equality(args, cuda) if "equality" in args.only else {}
    shape = start_shape(args, cuda) if {"speed", "segments", "kernels", "profile"} & set(args.only) else {}
    check_equality(equality, keep, say, until)
    for name, engine in shape.items():
        started = keep("start", name, engine.answer(until))
        say(f"{name}: started in {started.get('start_seconds', 0):.0f} s {started}")
    if "speed" in args.only:
        check_speed(shape, args.repeats, keep, say, until)
    drafting = shape.get("skip16_k4")
    if drafting is not None:
        for part in ("segments", "profile", "kernels"):
            if part not in args.only or (part != "segments" and not cuda):
                continue
            for rows in BATCHES if part == "segments" else (1,):
                arguments: dict[str, Any] = {"rows": rows} if part == "segments" else {}
                if part == "profile":
                    arguments = {"prompts": prompts(1), "tokens": 48, "folder": str(args.out)}
                result = keep(part, str(rows), drafting.ask(COMMANDS[part], until, **arguments))
                if cuda and part == "segments" and not result.get("graphs"):
                    keep(part, str(rows), {**result, "error": "drafts run without CUDA graphs"})
                say(f"{part} {rows}: {json.dumps(result, indent=1)}")
    for engine in shape.values():
        engine.stop()
    say("done" if not failed else f"FAILED: {', '.join(failed)}")
    return int(bool(failed))


def prompts(number: int) -> list[dict[str, list[int]]]:
    """Token ids that mean nothing, 128 each."""
    return [{"prompt_token_ids": [(7 * i + 13 * j) % 4000 + 5 for j in range(128)]} for i in range(number)]


def start_equality(args: argparse.Namespace, cuda: bool) -> dict[str, Engine]:
    """Engines of the demo model."""
    half = {**FIXED, "num_skipped_layers": 12, "num_speculative_tokens": 4, "optimization_interval": 8}
    engines = {}
    for dtype in ("float32", "bfloat16"):
        settings = {
            "dtype": dtype,
            "max_model_len": 512,
            "enforce_eager": dtype == "bfloat16",  # with graphs in float32, without in bfloat16
            "kv_cache_memory_bytes": 500_000_000,
            "gpu_memory_utilization": 0.02,
            "max_num_seqs": 16,
        }
        if cuda:
            settings["attention_backend"] = "TRITON_ATTN"
        for name, config in (("plain", None), ("half", half), ("default", {"method": "clasp"})):
            engines[f"{dtype}_{name}"] = Engine(
                f"{dtype}_{name}", "scripts/demo/model", config, settings, args.out / f"{dtype}_{name}.log"
            )
    return engines


def check_equality(engines: dict[str, Engine], keep: Any, say: Any, until: float) -> None:
    """Greedy tokens against plain vLLM's; the engines end here."""
    import random

    random.seed(3)
    lengths = [random.randrange(4, 60) for _ in range(16)]
    token_prompts = [{"prompt_token_ids": [random.randrange(5, 4000) for _ in range(n)]} for n in lengths]
    plain: dict[str, Any] = {}
    for name, engine in engines.items():
        started = keep("start", name, engine.answer(until))
        answer = engine.ask(generate, until, prompts=token_prompts, tokens=96)
        again = engine.ask(generate, until, prompts=token_prompts[:1], tokens=96)
        engine.stop()
        if "error" in answer or "error" in started:
            keep("equality", name, answer)
            continue
        dtype = name.partition("_")[0]
        plain.setdefault(dtype, answer["tokens"])
        same = sum(a == b for a, b in zip(plain[dtype], answer["tokens"], strict=True))
        alone = "error" not in again and again["tokens"][0] == plain[dtype][0]
        summary = {"identical": same, "of": 16, "alone_identical": alone, "counters": answer["counters"]}
        drafts, failures = (
            answer["counters"].get(k) for k in ("spec_decode_num_drafts", "layer_skip_failures")
        )
        if (dtype == "float32" and same < len(token_prompts)) or failures or drafts == 0:
            summary["error"] = "float32 must be identical, drafts more than 0 and failures 0"
        keep("equality", name, summary)
        say(f"{name}: {summary}")


def start_shape(args: argparse.Namespace, cuda: bool) -> dict[str, Engine]:
    """Engines of random weights, started at the same time."""
    folder = args.out / "shape"
    folder.mkdir(exist_ok=True)
    shape = SMALL if args.small else LLAMA_3_8B
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 1,
        **shape,
    }
    (folder / "config.json").write_text(json.dumps(config))
    layers = shape["num_hidden_layers"]
    settings = {
        "dtype": "bfloat16",
        "load_format": "dummy",
        "max_model_len": 1024,
        "skip_tokenizer_init": True,
        "max_num_seqs": 32,
        "kv_cache_memory_bytes": 1_500_000_000 if cuda else 300_000_000,
        "gpu_memory_utilization": 0.1,
    }

    def accepting(rate: float, tokens: int) -> dict[str, Any]:
        rates = [round(rate ** (i + 1), 4) for i in range(tokens)]
        return {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates} if cuda else {}

    def clasp(skipped: int, tokens: int, rate: float, **keys: Any) -> dict[str, Any]:
        fixed = {"num_skipped_layers": skipped, "optimization_interval": 64, "num_speculative_tokens": tokens}
        return {**FIXED, **fixed, **accepting(rate, tokens), **keys}

    nothing = {"method": "layer_skip", "skip_layers": [], "adaptive": False, "ngram_cascade": False}
    configs: dict[str, Any] = {
        "plain": None,
        "skip0_k3": {**nothing, "draft_exit_threshold": 0, "num_speculative_tokens": 3, **accepting(0.95, 3)},
        "skip16_k4": clasp(layers // 2, 4, 0.8),
        "skip8_k3": clasp(layers // 4, 3, 0.9),
        "default_a80": {"method": "clasp", **accepting(0.8, 8)},
        "default_a50": {"method": "clasp", **accepting(0.5, 8)},
    }
    return {
        name: Engine(name, folder, one, settings, args.out / f"{name}.log")
        for name, one in configs.items()
        if args.engines is None or name in args.engines
    }


def check_speed(engines: dict[str, Engine], repeats: int, keep: Any, say: Any, until: float) -> None:
    """Milliseconds per decoded token and sequence, in turn; what prefill takes is subtracted."""
    for batch in BATCHES:
        times: dict[str, list[float]] = {name: [] for name in engines}
        rounds: dict[str, dict[str, float]] = {}
        for repeat in range(repeats + 1):
            for name, engine in engines.items():
                if not engine.alive:
                    continue
                short = engine.ask(generate, until, prompts=prompts(batch), tokens=16)
                long = engine.ask(generate, until, prompts=prompts(batch), tokens=144)
                if "error" in short or "error" in long:
                    keep("speed", f"{name}_{batch}", short if "error" in short else long)
                elif repeat:  # the first warms up
                    times[name].append(1000 * (long["seconds"] - short["seconds"]) / 128)
                    rounds[name] = long["counters"]
        for name, per_token in times.items():
            if not per_token or not times["plain"]:
                continue
            ratios = sorted(p / own for p, own in zip(times["plain"], per_token, strict=False))
            drafts = rounds[name].get("spec_decode_num_drafts", 0)
            accepted = rounds[name].get("spec_decode_num_accepted_tokens", 0)
            summary = {
                "ms_per_token": sorted(per_token),
                "ratio_to_plain": ratios,
                "mean_accepted_length": 1 + accepted / drafts if drafts else None,
                "counters": rounds[name],
            }
            keep("speed", f"{name}_{batch}", summary)
            say(
                f"{batch} requests, {name}: "
                + json.dumps({k: v for k, v in summary.items() if k != "counters"})
            )


if __name__ == "__main__":
    sys.exit(main())
