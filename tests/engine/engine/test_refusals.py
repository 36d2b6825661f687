"""What layer skipping cannot serve is refused at start-up: one sentence with the feature and the way out.

Architectures of another form: test_architectures.
"""

import pytest
from engines import DEMO_MODEL, ROOT, engine_process, running

from clasp_vllm.engine.hooks import SUPPORTED

# Configurations of models (their config.json is all that is read), by transformers' name for the kind.
MODELS = {
    "mixture of experts": ("olmoe", "OlmoeForCausalLM", {"num_hidden_layers": 4}),
    "mla": ("deepseek_v2", "DeepseekV2ForCausalLM", {"num_hidden_layers": 4}),
    "state space": ("mamba", "MambaForCausalLM", {"num_hidden_layers": 4}),
    "hybrid": ("falcon_h1", "FalconH1ForCausalLM", {"num_hidden_layers": 4}),
    "encoder-decoder": ("whisper", "WhisperForConditionalGeneration", {}),
    "mixed attention": (
        "llama",
        "LlamaForCausalLM",
        {
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 64,
        },
    ),
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
    "routed experts, in JSON": (
        "mixture of experts",
        {"aux_output_config": {"enable_return_routed_experts": True}},
        ["routed experts"],
    ),
    "several kinds of attention": (
        "mixed attention",
        {},
        ["several kinds of attention", "full_attention, sliding_attention", "one kind"],
    ),
    "offloading": (None, {"cpu_offload_gb": 1}, ["weight offloading", "--cpu-offload-gb"]),
    "prefetch offloading": (None, {"offload_group_size": 4}, ["weight offloading", "--offload-group-size"]),
    "quantised KV cache": (
        None,
        {"kv_cache_dtype": "int8_per_token_head"},
        ["a KV cache of int8_per_token_head", "--kv-cache-dtype", "fp8_e4m3"],
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
    "synthetic on a CPU": (
        None,
        {
            "speculative_config": {
                "method": "clasp",
                "rejection_sample_method": "synthetic",
                "synthetic_acceptance_length": 3.0,
            }
        },
        ["rejection_sample_method='synthetic'", "allowed there is standard"],
    ),
    "schedule with a gap": (
        None,
        {"speculative_config": {"method": "clasp", "num_speculative_tokens_per_batch_size": [[2, 4, 3]]}},
        ["num_speculative_tokens_per_batch_size=[[2, 4, 3]]"],
    ),
    "quantised drafts of experts": (
        "mixture of experts",
        {"speculative_config": {"method": "clasp", "draft_weights": "int8"}},
        ["draft_weights='int8' for mixtures of experts", "leave out draft_weights"],
    ),
    "quantised drafts of a quantised model": (
        None,
        {"quantization": "fp8", "speculative_config": {"method": "clasp", "draft_weights": "int8"}},
        ["draft_weights='int8' for a model quantised by fp8", "leave out draft_weights"],
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
    error = call(message, str(tmp_path), kind, arguments)
    for part in parts:
        assert part in error
    assert "\n" not in error


def test_other_versions_of_vllm(call):
    error = call(message, "", None, {}, version="0.99.1")
    assert f"supports vLLM {' and '.join(SUPPORTED)}, but vLLM 0.99.1 is installed" in error


def start(settings: dict) -> str:
    try:
        with running(**settings):
            return "started"
    except ValueError as error:
        return str(error)


def test_too_small_a_cache(call):
    error = call(start, {"speculative_config": CLASP, "num_gpu_blocks_override": 50, "block_size": 32})
    for part in ("50 blocks of 32 tokens", "64 are scratch", "512 tokens", "max_optimized_requests"):
        assert part in error


def watermarked() -> str:
    from vllm.engine.arg_utils import EngineArgs

    config = CLASP | {"draft_sample_method": "probabilistic"}
    try:
        EngineArgs(
            model=str(DEMO_MODEL), watermark_config={"key": 1}, speculative_config=config
        ).create_engine_config()
    except ValueError as error:
        return str(error)
    return "not refused"


def test_watermarks(call):
    """By vLLM."""
    assert "Watermarking supports only autoregressive model-based" in call(watermarked)


def to_be_traced(method: dict) -> str:
    """What vLLM says to a request that brings its own answer."""
    from vllm import SamplingParams

    with running(speculative_config=method) as llm:
        params = SamplingParams(max_tokens=2, trace_decode_token_ids=[5, 6])
        with pytest.raises(ValueError, match="trace") as error:
            llm.generate(["a"], params, use_tqdm=False)
        return str(error.value)


def test_a_traced_request_as_with_vllms_methods():
    messages = set()
    for method in (CLASP, {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}):
        with engine_process("v1") as call:  # lookups leave no room for a second engine in a process
            messages.add(call(to_be_traced, method))
    assert messages == {"trace_decode_token_ids is not supported with speculative decoding."}


# What vLLM itself will not configure on a CPU, or no small model has: the check alone.
ASKED_OF_A_STAND_IN = {
    "expert load balancing": ("parallel", "enable_eplb"),
    "diffusion language models": ("model", "is_diffusion"),
    "encoder-cache transfer": ("engine", "ec_transfer_config"),
}


def message_for(which: str, attribute: str) -> str:
    """The message with one attribute of otherwise acceptable configurations switched on."""
    from vllm.engine.arg_utils import EngineArgs

    from clasp_vllm.config import ConfigError
    from clasp_vllm.engine.translate import refuse_unsupported

    class Changed:
        def __init__(self, original: object) -> None:
            self._original = original

        def __getattr__(self, name: str) -> object:
            return True if name == attribute else getattr(self._original, name)

    args = EngineArgs(model=str(DEMO_MODEL))
    vllm_config = args.create_engine_config()
    parts = {"engine": args, "model": vllm_config.model_config, "parallel": vllm_config.parallel_config}
    refuse_unsupported(*parts.values())
    parts[which] = Changed(parts[which])
    try:
        refuse_unsupported(*parts.values())
    except ConfigError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize("feature", ASKED_OF_A_STAND_IN)
def test_refused_by_the_check(call, feature):
    error = call(message_for, *ASKED_OF_A_STAND_IN[feature])
    assert f"does not support {feature}: leave out --" in error or "autoregressive" in error
