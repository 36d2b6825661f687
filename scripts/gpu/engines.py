"""The engines that are checked, each in a process of its own, and what they are asked."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from clasp_vllm.tools.processes import Engine

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
BATCHES = (1, 8, 32)  # requests, or rows of a draft step
# That fit on a card of 141 GB together.
DEFAULT_ENGINES = ("plain", "skip16_k4", "fp8_k4", "int4_k4", "default_a80")
START, QUESTION = 180, 60  # seconds to wait for at most, lest one engine that hangs take all the time
DEMO_MODEL = Path(__file__).parents[1] / "demo" / "model"


def prompts(number: int) -> list[dict[str, list[int]]]:
    """Token ids that mean nothing, 128 each."""
    return [{"prompt_token_ids": [(7 * i + 13 * j) % 4000 + 5 for j in range(128)]} for i in range(number)]


def patience(until: float, seconds: float) -> float:
    """Until when to wait for an answer that should be there within so many seconds."""
    return min(until, time.monotonic() + seconds)


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
        int8, fp8, int4 = ({**half, "draft_weights": precision} for precision in ("int8", "fp8", "int4"))
        configs = {"plain": None, "half": half, "default": {"method": "clasp"}}
        configs |= {"int8": int8, "fp8": fp8, "int4": int4} if cuda else {"int8": int8}
        configs["window"] = {**half, "draft_context": 64}
        if cuda:
            configs["lookup"] = {"method": "clasp", "ngram_cascade": True}
        for name, config in configs.items():
            engines[f"{dtype}_{name}"] = Engine(
                f"{dtype}_{name}", DEMO_MODEL, config, settings, args.out / f"{dtype}_{name}.log"
            )
    return engines


def start_shape(args: argparse.Namespace, cuda: bool) -> dict[str, Engine]:
    """Engines of random weights, started at the same time.

    Raises:
        SystemExit: ``args.engines`` names one that there is not.
    """
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
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": 1_500_000_000 if cuda else 300_000_000,
        "gpu_memory_utilization": 0.1,
    }

    def accepting(rate: float, tokens: int) -> dict[str, Any]:
        rates = [round(rate ** (i + 1), 4) for i in range(tokens)]
        return {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates} if cuda else {}

    def clasp(skipped: int, tokens: int, rate: float, **keys: Any) -> dict[str, Any]:
        layers = {"num_skipped_layers": skipped, "optimization_interval": 64}
        return {**FIXED, **layers, **fixed(tokens, rate), **keys}

    def fixed(tokens: int, rate: float) -> dict[str, Any]:
        return {"draft_exit_threshold": 0, "num_speculative_tokens": tokens, **accepting(rate, tokens)}

    nothing = {"method": "layer_skip", "skip_layers": [], "adaptive": False, "ngram_cascade": False}
    configs: dict[str, Any] = {
        "plain": None,
        "skip0_k3": {**nothing, **fixed(3, 0.95)},
        "skip16_k4": clasp(layers // 2, 4, 0.8),
        "skip8_k3": clasp(layers // 4, 3, 0.9),
        "fp8_k4": {**nothing, "draft_weights": "fp8", **fixed(4, 0.94)},
        "int4_k4": {**nothing, "draft_weights": "int4", **fixed(4, 0.90)},
        "default_a80": {"method": "clasp", **accepting(0.8, 8)},
        "default_a50": {"method": "clasp", **accepting(0.5, 8)},
    }
    if unknown := set(args.engines) - set(configs):
        raise SystemExit(f"--engines: {', '.join(unknown)}: allowed are {', '.join(configs)}")
    return {
        name: Engine(name, folder, one, settings, args.out / f"{name}.log")
        for name, one in configs.items()
        if name in args.engines
    }
