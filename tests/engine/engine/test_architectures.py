"""The Llama family is recognised by its form; everything else is refused with what works."""

import pytest
import torch
from engines import engine_process, generate, running

PROMPTS = [{"prompt_token_ids": [1, *range(i, i + 3 * i)]} for i in range(3, 11)]
CLASP = {
    "method": "clasp",
    "adaptive": False,
    "num_speculative_tokens": 3,
    "optimization_interval": 2,
    "num_skipped_layers": 2,
    "draft_exit_threshold": 0.0,
}
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.12,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

SUPPORTED = {
    "llama": {},
    # The CPU's kernels for norms and SiLU want widths that are multiples of eight.
    "odd llama": {"intermediate_size": 100, "hidden_size": 60, "num_attention_heads": 2},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}
REFUSED = {
    "gemma2": {"query_pre_attn_scalar": 32, "layer_types": ["full_attention"] * 5},
    "granite": {},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 2, "n_positions": 256},
}


ENGINE = {"max_model_len": 256, "skip_tokenizer_init": True, "kv_cache_memory_bytes": 64 << 20}


def save(kind: str, settings: dict, folder: str) -> str:
    """A random checkpoint. Weights this large keep the output from being one token repeated."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    own = settings if kind == "gpt2" else SMALL | settings
    config = AutoConfig.for_model(
        kind.removeprefix("odd "), **({"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2} | own)
    )
    path = f"{folder}/{kind.replace(' ', '_')}"
    AutoModelForCausalLM.from_config(config).float().save_pretrained(path)
    return path


def quantise(path: str) -> None:
    """Turn a saved checkpoint's linear layers into 8-bit integers, as compressed-tensors stores them."""
    import json

    import torch
    from safetensors.torch import load_file, save_file

    weights = {}
    for name, weight in load_file(f"{path}/model.safetensors").items():
        if name.endswith("proj.weight"):
            scale = weight.abs().amax(1, keepdim=True) / 127
            weights[name] = (weight / scale).round().to(torch.int8)
            weights[f"{name}_scale"] = scale
        else:
            weights[name] = weight
    save_file(weights, f"{path}/model.safetensors", metadata={"format": "pt"})
    with open(f"{path}/config.json") as file:
        config = json.load(file)
    integers = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": integers | {"strategy": "channel"},
                "input_activations": integers | {"strategy": "token", "dynamic": True},
            }
        },
    }
    with open(f"{path}/config.json", "w") as file:
        json.dump(config, file)


def outcomes(kind: str, folder: str, quantised: bool = False, **settings) -> tuple:
    path = save(kind, SUPPORTED[kind], folder)
    if quantised:
        quantise(path)
    generated = []
    for spec in (
        None,
        CLASP,
        CLASP | {"optimization_interval": 1, "max_optimized_requests": 8},
        {"method": "layer_skip", "skip_layers": [], "num_speculative_tokens": 3},
    ):
        with running(path, spec, **(ENGINE | settings)) as llm:
            generated.append(generate(llm, PROMPTS, max_tokens=24, detokenize=False))
    return tuple(generated)


def refusal(kind: str, folder: str) -> str:
    path = save(kind, REFUSED[kind], folder)
    try:
        with running(
            path, CLASP, max_model_len=128, skip_tokenizer_init=True, kv_cache_memory_bytes=64 << 20
        ):
            return "started"
    except ValueError as error:
        return str(error)


@pytest.fixture(scope="module")
def call():
    with engine_process("v1") as call:
        yield call


def check(generated: tuple) -> None:
    plain, clasp, optimising, nothing_skipped = generated
    assert len({tuple(ids) for ids in plain.token_ids}) == len(PROMPTS)
    assert clasp.token_ids == plain.token_ids
    assert optimising.token_ids == plain.token_ids
    assert optimising.accepted_per_position[0] == optimising.num_drafts > 0
    assert nothing_skipped.token_ids == plain.token_ids
    assert nothing_skipped.num_accepted_tokens == nothing_skipped.num_draft_tokens > 0


@pytest.mark.parametrize("kind", SUPPORTED)
def test_supported(call, kind, tmp_path):
    check(call(outcomes, kind, str(tmp_path)))


def test_quantised_weights(call, tmp_path):
    """The CPU's integer kernel wants bfloat16, in which rounding may change a token here and there."""
    generated = call(outcomes, "llama", str(tmp_path), quantised=True, dtype="bfloat16")
    plain, nothing_skipped = generated[0], generated[-1]
    for other in generated[1:]:
        same = [a == b for a, b in zip(plain.token_ids, other.token_ids, strict=True)]
        assert sum(same) >= len(PROMPTS) - 2
    assert nothing_skipped.num_accepted_tokens > 0.9 * nothing_skipped.num_draft_tokens > 0


@pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM has no FP8 cache on a CPU without AVX-512"
)
def test_quantised_kv_cache(call, tmp_path):
    check(call(outcomes, "llama", str(tmp_path), kv_cache_dtype="fp8"))


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(call, kind, tmp_path):
    message = call(refusal, kind, str(tmp_path))
    assert "layer skipping does not support" in message
    assert "Llama, Mistral, Qwen2, Qwen3" in message
