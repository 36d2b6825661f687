"""From our configuration to vLLM's, with the refusals that need to know the model."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from vllm import envs
from vllm.config import ModelConfig, ParallelConfig
from vllm.platforms import current_platform
from vllm.utils.torch_utils import resolve_kv_cache_dtype_string
from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

from clasp_vllm.calibration.store import Calibration
from clasp_vllm.config import ConfigError, LayerSkipConfig, parse_config, resolve
from clasp_vllm.engine.speculative_config import LayerSkipSpeculativeConfig

# Quantised caches with scales of their own beside the values are left out: nobody has tried to copy
# their blocks.
KV_CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")


def speculative_config(
    engine_args: Any, target_model_config: ModelConfig, target_parallel_config: ParallelConfig
) -> LayerSkipSpeculativeConfig:
    """The SpeculativeConfig of engine arguments that ask for one of our methods.

    Raises:
        ConfigError: a setting is wrong, or the model or the engine has a feature that layer skipping
            cannot serve.
    """
    config = parse_config(_settings(engine_args))
    num_layers = target_model_config.get_total_num_hidden_layers()
    resolve(config, num_layers, max_num_seqs=1)  # refuses layers that there are not
    if config.calibration is not None:
        Calibration(config.calibration).check_shape(num_layers, target_model_config.get_hidden_size())
    schedule = config.num_speculative_tokens_per_batch_size
    if schedule is not None:
        try:
            validate_and_normalize_dynamic_sd_schedule(schedule)
        except ValueError as error:
            raise ConfigError(f"num_speculative_tokens_per_batch_size={schedule!r}: {error}") from None
    refuse_unsupported(engine_args, target_model_config, target_parallel_config, config.draft_weights)
    if config.quantises:
        _refuse_precision(config, target_model_config)
    vllm_settings = config.vllm_settings()
    v1_on_cpu = current_platform.is_cpu() and not envs.VLLM_USE_V2_MODEL_RUNNER
    if config.draft_sample_method is None:
        vllm_settings["draft_sample_method"] = "probabilistic" if v1_on_cpu else "greedy"
    try:
        made = LayerSkipSpeculativeConfig(
            **vllm_settings,
            target_model_config=target_model_config,
            target_parallel_config=target_parallel_config,
            layer_skip=config,
        )
    except ValidationError as error:  # of vLLM's own keys
        reasons = "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())
        raise ConfigError(f"speculative configuration: {reasons}") from None
    if config.rejection_sample_method == "synthetic" and v1_on_cpu:
        raise ConfigError(
            "rejection_sample_method='synthetic': vLLM's rejection sampler for CPUs has no synthetic "
            "acceptance; allowed there is standard"
        )
    return made


def _settings(engine_args: Any) -> dict[str, Any]:
    """The keys given, those given as flags of their own among them."""
    settings = dict(engine_args.speculative_config or {})
    for flag, key, value in (
        ("--spec-method", "method", engine_args.spec_method),
        ("--spec-tokens", "num_speculative_tokens", engine_args.spec_tokens),
    ):
        if value is not None:
            if settings.get(key, value) != value:
                raise ConfigError(
                    f"{flag}={value!r} and the speculative configuration's {key}={settings[key]!r} "
                    "exclude each other; give one of them"
                )
            settings[key] = value
    return settings


def _refuse_precision(config: LayerSkipConfig, model_config: ModelConfig) -> None:
    from clasp_vllm.engine.precisions import unavailable  # brings all of vLLM's kernels with it

    reason = unavailable(config.draft_weights, model_config.dtype, config.group_size)
    if reason is not None:
        raise ConfigError(
            f"draft_weights={config.draft_weights!r} has no kernel here: {reason}. Allowed are those of "
            "target, int8, fp8 and int4 that have one"
        )


def refuse_unsupported(
    engine_args: Any,
    model_config: ModelConfig,
    parallel_config: ParallelConfig,
    draft_weights: str = "target",
) -> None:
    """Raises ConfigError for the first feature that layer skipping cannot serve."""
    # Long, for it is one table.
    kv_cache_dtype = resolve_kv_cache_dtype_string(engine_args.kv_cache_dtype, model_config)
    attention_kinds = set(getattr(model_config.hf_text_config, "layer_types", None) or ())
    refusals = (
        (
            engine_args.spec_model is not None,
            "--spec-model",
            "the target model drafts for itself; leave it out",
        ),
        (
            parallel_config.pipeline_parallel_size > 1,
            "pipeline parallelism",
            "use tensor parallelism (--tensor-parallel-size)",
        ),
        (
            parallel_config.decode_context_parallel_size > 1,
            "decode context parallelism",
            "use tensor parallelism (--tensor-parallel-size)",
        ),
        (
            parallel_config.prefill_context_parallel_size > 1,
            "prefill context parallelism",
            "use tensor parallelism (--tensor-parallel-size)",
        ),
        (
            parallel_config.data_parallel_size > 1 and model_config.is_moe,
            "data parallelism of mixture-of-experts models",
            "use tensor parallelism (--tensor-parallel-size), or one server per replica",
        ),
        (parallel_config.enable_eplb, "expert load balancing", "leave out --enable-eplb"),
        (parallel_config.use_ubatching, "dual batch overlap", "leave out --enable-dbo and --ubatch-size"),
        (
            engine_args.aux_output_config.enabled,
            "returning routed experts",
            "leave out --enable-return-routed-experts",
        ),
        (
            engine_args.cpu_offload_gb > 0 or engine_args.offload_group_size > 0,
            "weight offloading",
            "leave out --cpu-offload-gb and --offload-group-size, or use more tensor parallelism",
        ),
        (
            engine_args.ec_transfer_config is not None,
            "encoder-cache transfer",
            "leave out --ec-transfer-config",
        ),
        (
            kv_cache_dtype not in KV_CACHE_DTYPES,
            f"a KV cache of {kv_cache_dtype}",
            f"set --kv-cache-dtype to one of {', '.join(KV_CACHE_DTYPES)}",
        ),
        (
            draft_weights not in ("target", "auto") and model_config.quantization is not None,
            f"draft_weights={draft_weights!r} for a model quantised by {model_config.quantization}",
            "leave out draft_weights, or serve the model unquantised",
        ),
        (
            draft_weights not in ("target", "auto") and model_config.is_moe,
            f"draft_weights={draft_weights!r} for mixtures of experts",
            "leave out draft_weights",
        ),
        (model_config.runner_type != "generate", "pooling models", "use a generative model"),
        (model_config.is_encoder_decoder, "encoder-decoder models", "use a decoder-only model"),
        (model_config.is_multimodal_model, "multimodal models", "use a text model"),
        (model_config.is_diffusion, "diffusion language models", "use an autoregressive model"),
        (model_config.use_mla, "multi-head latent attention", "use a Llama-like model"),
        (
            model_config.is_hybrid or model_config.is_attention_free,
            "models with state-space layers",
            "use a Llama-like model",
        ),
        (
            len(attention_kinds) > 1,
            f"several kinds of attention in one model ({', '.join(sorted(attention_kinds))})",
            "use a model with one kind",
        ),
    )
    for present, feature, way_out in refusals:
        if present:
            raise ConfigError(f"layer skipping does not support {feature}: {way_out}")
