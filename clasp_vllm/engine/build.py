"""Puts a drafter together for a model runner."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaModel
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer, Qwen2Model
from vllm.v1.core.kv_cache_utils import update_kv_cache_capacity
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

from clasp_vllm.config import ConfigError, DraftSettings, resolve
from clasp_vllm.control.controller import Controller
from clasp_vllm.control.costs import LayerShares, PassCosts
from clasp_vllm.drafting.context import tokens_read
from clasp_vllm.drafting.decoder import Decoder
from clasp_vllm.drafting.draft import DrafterOptions
from clasp_vllm.drafting.drafter import Drafter
from clasp_vllm.drafting.passes import DraftRunner, Model, Passes
from clasp_vllm.drafting.scratch import ScratchBlocks
from clasp_vllm.drafting.sequences import SequenceTable
from clasp_vllm.engine.attention import TargetAttention
from clasp_vllm.engine.draft_weights import draft_logits, draft_view, follow_embedding, num_bytes
from clasp_vllm.engine.eager import eager_view
from clasp_vllm.engine.methods import METHODS, Target
from clasp_vllm.engine.speculative_config import layer_skip_config

logger = init_logger(f"vllm.{__name__}")  # under vLLM's name, so that its log settings hold

WORKS = "Llama, Mistral, Qwen2, Qwen3 and others whose decoder layers have the same form"


def num_layers_of(vllm_config: VllmConfig) -> int:
    """The number of decoder layers of the target."""
    return vllm_config.model_config.get_total_num_hidden_layers()


def _layer_shares(vllm_config: VllmConfig) -> LayerShares:
    """By the weights that a token reads, of the model's configuration, as if they were not quantised."""
    model = vllm_config.model_config
    text, head_size = model.hf_text_config, model.get_head_size()
    heads, kv_heads = text.num_attention_heads, getattr(text, "num_key_value_heads", text.num_attention_heads)
    experts = getattr(text, "num_experts_per_tok", None) or 1
    width = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    return LayerShares.of(
        2 * (heads + kv_heads) * head_size * text.hidden_size, 3 * experts * width * text.hidden_size
    )


def draft_settings(vllm_config: VllmConfig) -> DraftSettings:
    """Our configuration, resolved for the model and the engine."""
    config = layer_skip_config(vllm_config)
    assert config is not None
    return resolve(config, num_layers_of(vllm_config), vllm_config.scheduler_config.max_num_seqs)


def without_scratch(
    vllm_config: VllmConfig, groups_by_worker: Sequence[list[KVCacheGroupSpec]], memory: Sequence[int]
) -> list[int]:
    """[workers] bytes of the KV cache that the scheduler may hand out, of ``memory`` bytes."""
    scratch = draft_settings(vllm_config).scratch_blocks
    block_bytes = (
        sum(group.kv_cache_spec.page_size_bytes * len(group.layer_names) for group in groups)
        for groups in groups_by_worker
    )
    return [left - scratch * size for left, size in zip(memory, block_bytes, strict=True)]


def hold_back_scratch_blocks(vllm_config: VllmConfig, scheduler_config: KVCacheConfig) -> None:
    """Take the scratch blocks out of what the scheduler may hand out: the last ones.

    The workers allocate the whole cache, so layouts and the profiled memory stay as they are.

    Raises:
        ConfigError: too few blocks would be left for one request, or the cache has several groups.
    """
    if len(scheduler_config.kv_cache_groups) != 1:
        raise ConfigError(
            "layer skipping does not support models with several KV cache groups (mixed sliding-window "
            "and full attention): use a model with one kind of attention"
        )
    scratch = draft_settings(vllm_config).scratch_blocks
    block_size = scheduler_config.kv_cache_groups[0].kv_cache_spec.block_size
    max_model_len = vllm_config.model_config.max_model_len
    needed = -(-max_model_len // block_size) + 1  # and the null block
    if scheduler_config.num_blocks - scratch < needed:
        raise ConfigError(
            f"the KV cache has {scheduler_config.num_blocks} blocks of {block_size} tokens; of these "
            f"{scratch} are scratch for optimisation passes, and a request of {max_model_len} tokens "
            f"needs {needed}. Lower max_optimized_requests, num_skipped_layers or --max-model-len, or "
            "give the cache more memory."
        )
    # Connectors of the scheduler work out the size of a block from these, which must be the workers'.
    left = scheduler_config.num_blocks - scratch
    scheduler_config.kv_cache_tensors = [
        replace(tensor, size=tensor.size // scheduler_config.num_blocks * left)
        for tensor in scheduler_config.kv_cache_tensors
    ]
    scheduler_config.num_blocks = left
    vllm_config.cache_config.num_gpu_blocks = scheduler_config.num_blocks
    update_kv_cache_capacity(vllm_config, scheduler_config)


def build_decoder(model: nn.Module) -> Decoder:
    """The target as single layers.

    Raises:
        UnsupportedArchitectureError: it has not the form of a Llama.
    """
    return Decoder(model, (LlamaDecoderLayer, Qwen2DecoderLayer), (LlamaModel, Qwen2Model), WORKS, eager_view)


def build_drafter(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    model: nn.Module,
    decoder: Decoder,
    device: torch.device,
    padded: bool,
    drop_stopped: bool = False,
    graphs: Callable[[], DraftRunner | None] = lambda: None,
) -> tuple[Drafter, TargetAttention]:
    """A drafter over the target's layers and KV cache, and the attention it uses.

    Args:
        padded: whether the runner verifies drafts in full length, however short they are.
        drop_stopped: see ``Drafter``.
        graphs: see ``Passes``.
    """
    # Long, for it puts all parts together.
    settings = draft_settings(vllm_config)
    logger.info_once("Layer skipping: %s", settings.summary)
    shares = _layer_shares(vllm_config)
    method = METHODS[settings.method](settings, Target(vllm_config, decoder, shares, device))
    max_num_seqs = vllm_config.scheduler_config.max_num_seqs
    most, optimized = method.budgets[-1], settings.optimized_requests
    first_scratch = kv_cache_config.num_blocks - settings.scratch_blocks
    max_rows = max(max_num_seqs, optimized * (most + 1))
    attention = TargetAttention(vllm_config, kv_cache_config, device, max_rows, first_scratch)
    scratch = None
    if optimized:
        columns, size = settings.scratch_columns, attention.block_size
        scratch = ScratchBlocks(first_scratch, optimized, columns, size, device)
    sequences = SequenceTable(max_num_seqs, method.masks)
    target = Model(decoder, model.compute_logits)  # type: ignore[arg-type]
    passes = Passes(target, attention, scratch, graphs, _draft_model(settings, decoder, model))
    ranks = get_tp_group().world_size
    size, sink = attention.block_size, attention.sink
    contexts = [None if w is None else tokens_read(w, size, sink) for w in settings.contexts]
    share = _share_rank_zero if ranks > 1 else _own

    def make_controller(costs: PassCosts) -> Controller:
        return Controller(
            costs,
            max_num_seqs,
            method.budgets,
            contexts,
            decoder.num_layers,
            shares,
            settings.num_speculative_tokens,
            settings.interval,
            settings.open_choices,
            padded=padded,
            drop_stopped=drop_stopped,
            ranks=ranks,
            log=partial(logger.debug, "Layer skipping: %s") if logger.isEnabledFor(logging.DEBUG) else None,
        )

    drafter = Drafter(
        decoder,
        passes,
        sequences,
        method.policy(sequences, passes, share),
        DrafterOptions(method.budgets, settings.contexts, settings.interval or 1, settings.exit_threshold),
        make_controller if settings.adaptive else None,
        share,
        on_failure=_go_on_without_drafts,
    )
    drafter.drop_stopped = drop_stopped
    return drafter, attention


def _draft_model(settings: DraftSettings, decoder: Decoder, model: nn.Module) -> Model | None:
    """The target with quantised weights; None: drafts run its own."""
    if settings.draft_weights == "target":
        return None
    size = num_bytes(model)
    if not size:  # auto may come to that
        return None
    follow_embedding(model)
    logger.info_once("Layer skipping: draft weights (%s) take %.2f GiB", settings.draft_weights, size / 2**30)
    return Model(decoder.with_layers(draft_view), draft_logits(model))


def _own(tensor: Tensor) -> Tensor:
    return tensor


def _share_rank_zero(tensor: Tensor) -> Tensor:
    """Rank 0 decides for all tensor-parallel ranks: they must run the same layers or they hang."""
    shared: Tensor = get_tp_group().broadcast(tensor.contiguous(), src=0)
    return shared


def first_broadcast(device: torch.device) -> None:
    """Share something for the first time, which is when NCCL allocates its buffers.

    To be called when the model is loaded: vLLM then counts them before it gives the rest to the KV cache.
    """
    if get_tp_group().world_size > 1:
        _share_rank_zero(torch.zeros(1, device=device))


def any_rank(flag: bool) -> bool:
    """Whether it is so on any tensor-parallel rank. All of them ask; the host waits."""
    group = get_tp_group()
    if group.world_size == 1:
        return flag
    flags = torch.tensor(int(flag), device="cpu")
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=group.cpu_group)
    return bool(flags)


def _go_on_without_drafts(error: Exception, failures_before: int) -> None:
    """Log the drafter's first failure. Where drafting cannot simply be left out the engine ends."""
    group = get_tp_group()
    if group.rank_in_group > 0:
        # Other ranks wait for this one. That its process is gone vLLM sees at once; what it would answer vLLM
        # does not read, for it asks rank 0 alone.
        logger.critical(
            "Layer skipping failed on rank %d of %d. The others wait for it, so the engine ends.",
            group.rank_in_group,
            group.world_size,
            exc_info=error,
        )
        os._exit(1)
    if group.world_size > 1 or isinstance(error, torch.AcceleratorError):  # after that nothing works
        raise error
    if failures_before == 0:
        logger.error(
            "Layer skipping failed; this step goes without drafts. Further failures are only counted, "
            "in vllm:layer_skip_failures.",
            exc_info=error,
        )


def log_statistics(drafter: Drafter) -> None:
    """Say now and then what drafting did."""
    report = drafter.statistics.report()
    if report is not None:
        logger.info(report)
