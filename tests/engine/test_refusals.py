"""What layer skipping cannot serve is refused at start-up: one sentence with the feature and the way out.

Architectures of another form: test_architectures.
"""

import pytest
from engines import DEMO_MODEL, ROOT, engine_process, running

# Configurations of models (their config.json is all that is read), by transformers' name for the kind.
MODELS = {
    "mixture of experts": ("olmoe", "OlmoeForCausalLM", {"num_hidden_layers": 4}),
    "mla": ("deepseek_v2", "DeepseekV2ForCausalLM", {"num_hidden_layers": 4}),
    "state space": ("mamba", "MambaForCausalLM", {"num_hidden_layers": 4}),
    "hybrid": ("falcon_h1", "FalconH1ForCausalLM", {"num_hidden_layers": 4}),
    "encoder-decoder": ("whisper", "WhisperForConditionalGeneration", {}),
    "multimodal": ("qwen2_audio", "Qwen2AudioForConditionalGeneration", {}),
}
CLASP = {"method": "clasp"}
TP = "--tensor-parallel-size"

# name: (model or None for the demo model, engine arguments, parts of the message)
CASES = {
    "pipeline parallelism": (None, {"pipeline_parallel_size": 2}, ["pipeline parallelism", TP]),
    "decode context parallelism": (
        None,
        {"decode_context_parallel_size": 2, "tensor_parallel_size": 2},
        ["decode context parallelism", TP],
    ),
    "prefill context parallelism": (
        None,
        {"prefill_context_parallel_size": 2},
        ["prefill context parallelism", TP],
    ),
    "experts, data parallel": (
        "mixture of experts",
        {"data_parallel_size": 2},
        ["data parallelism of mixture-of-experts models", TP],
    ),
    "dual batch overlap": (None, {"enable_dbo": True}, ["dual batch overlap", "--enable-dbo"]),
    "routed experts": (
        "mixture of experts",
        {"enable_return_routed_experts": True},
        ["routed experts", "--enable-return-routed-experts"],
    ),
    "offloading": (None, {"cpu_offload_gb": 1}, ["weight offloading", "--cpu-offload-gb"]),
    "prefetch offloading": (None, {"offload_group_size": 4}, ["weight offloading", "--offload-group-size"]),
    "LoRA": (None, {"enable_lora": True}, ["LoRA", "merged model"]),
    "quantised KV cache": (
        None,
        {"kv_cache_dtype": "int8_per_token_head"},
        ["--kv-cache-dtype int8_per_token_head", "fp8_e4m3"],
    ),
    "pooling": (None, {"runner": "pooling", "convert": "embed"}, ["pooling models", "generative model"]),
    "MLA": ("mla", {}, ["multi-head latent attention", "Llama-like"]),
    "state space": ("state space", {}, ["state-space layers", "Llama-like"]),
    "hybrid": ("hybrid", {}, ["state-space layers", "Llama-like"]),
    "encoder-decoder": ("encoder-decoder", {}, ["encoder-decoder models", "decoder-only"]),
    "multimodal": ("multimodal", {}, ["multimodal models", "text model"]),
    "--spec-model": (None, {"spec_model": "another"}, ["--spec-model", "leave it out"]),
    "--spec-tokens": (
        None,
        {"spec_tokens": 3, "speculative_config": {"method": "clasp", "num_speculative_tokens": 4}},
        ["--spec-tokens=3", "num_speculative_tokens=4"],
    ),
    "synthetic without rates": (
        None,
        {"speculative_config": {"method": "clasp", "rejection_sample_method": "synthetic"}},
        ["synthetic_acceptance_rates"],
    ),
    "schedule with a gap": (
        None,
        {"speculative_config": {"method": "clasp", "num_speculative_tokens_per_batch_size": [[2, 4, 3]]}},
        ["num_speculative_tokens_per_batch_size=[[2, 4, 3]]"],
    ),
    "a list": (None, {"speculative_config": str(ROOT / "tests" / "data" / "list.yaml")}, ["a list"]),
}


def message(folder: str, kind: str | None, arguments: dict, version: str | None = None) -> str:
    """What EngineArgs says before any weight is loaded."""
    import vllm
    from transformers import AutoConfig
    from vllm.engine.arg_utils import EngineArgs

    from clasp_vllm.config import ConfigError

    model = str(DEMO_MODEL)
    if kind is not None:
        name, architecture, settings = MODELS[kind]
        AutoConfig.for_model(name, architectures=[architecture], **settings).save_pretrained(folder)
        model = folder
    installed, vllm.__version__ = vllm.__version__, version or vllm.__version__
    try:
        EngineArgs(
            **({"model": model, "skip_tokenizer_init": True, "speculative_config": CLASP} | arguments)
        ).create_engine_config()
    except ConfigError as error:
        return str(error)
    finally:
        vllm.__version__ = installed
    return "not refused"


@pytest.fixture(scope="module")
def call():
    with engine_process("v1") as call:
        yield call


@pytest.mark.parametrize("case", CASES)
def test_refused_before_loading(call, case, tmp_path):
    kind, arguments, parts = CASES[case]
    found = call(message, str(tmp_path), kind, arguments)
    for part in parts:
        assert part in found
    assert "\n" not in found


def test_other_versions_of_vllm(call):
    found = call(message, "", None, {}, version="0.99.1")
    assert "supports vLLM 0.32.*, but vLLM 0.99.1 is installed" in found


def start(settings: dict) -> str:
    try:
        with running(**settings):
            return "started"
    except ValueError as error:
        return str(error)


def test_too_small_a_cache(call):
    found = call(start, {"speculative_config": CLASP, "num_gpu_blocks_override": 50, "block_size": 32})
    for part in ("50 blocks of 32 tokens", "48 are scratch", "512 tokens", "max_optimized_requests"):
        assert part in found


def mixed_attention(folder: str) -> str:
    """A Llama of which some layers attend to a window and others to everything."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    config.layer_types = ["sliding_attention", "full_attention"] * 2
    config.sliding_window = 64
    config.save_pretrained(folder)
    return start(
        {
            "model": folder,
            "speculative_config": CLASP,
            "max_model_len": 256,
            "skip_tokenizer_init": True,
            "kv_cache_memory_bytes": 64 << 20,
        }
    )


def test_several_kv_cache_groups(call, tmp_path):
    found = call(mixed_attention, str(tmp_path))
    assert "several KV cache groups" in found
    assert "sliding-window" in found
