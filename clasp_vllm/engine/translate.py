"""From our configuration to vLLM's, with the refusals that need to know the model."""

from __future__ import annotations

from typing import Any

from vllm.config import ModelConfig, ParallelConfig

from clasp_vllm.config import ConfigError, parse_config
from clasp_vllm.engine.speculative_config import LayerSkipSpeculativeConfig


def speculative_config(
    engine_args: Any, model_config: ModelConfig, parallel_config: ParallelConfig
) -> LayerSkipSpeculativeConfig:
    """The SpeculativeConfig of engine arguments that ask for one of our methods.

    Raises:
        ConfigError: a setting is wrong, or the model or the engine has a feature that layer skipping
            cannot serve.
    """
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
    config = parse_config(settings)
    config.budget(model_config.get_total_num_hidden_layers())
    refuse_unsupported(engine_args, model_config, parallel_config)
    return LayerSkipSpeculativeConfig(
        **config.vllm_settings(),
        target_model_config=model_config,
        target_parallel_config=parallel_config,
        layer_skip=config,
    )


def refuse_unsupported(engine_args: Any, model_config: ModelConfig, parallel_config: ParallelConfig) -> None:
    """Raises ConfigError for the first feature that layer skipping cannot serve."""
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
        (engine_args.enable_lora, "LoRA", "serve the merged model, or leave out --enable-lora"),
        (model_config.runner_type != "generate", "pooling models", "use a generative model"),
        (model_config.is_encoder_decoder, "encoder-decoder models", "use a decoder-only model"),
        (model_config.is_multimodal_model, "multimodal models", "use a text model"),
        (model_config.use_mla, "multi-head latent attention", "use a Llama-like model"),
        (
            model_config.is_hybrid or model_config.is_attention_free,
            "models with state-space layers",
            "use a Llama-like model",
        ),
    )
    for present, feature, way_out in refusals:
        if present:
            raise ConfigError(f"layer skipping does not support {feature}: {way_out}")
