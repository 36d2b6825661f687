"""The target's paged attention for one query token per row, on any rows and any blocks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.forward_context import set_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.kv_cache_interface import KVCacheConfig, SlidingWindowSpec
from vllm.v1.worker.block_table import get_block_table_width
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, init_attn_backend
from vllm.v1.worker.utils import AttentionGroup

from clasp_vllm.engine.eager import eager_kernels


class TargetAttention:
    """Builds the forward context in which the target's layers decode a batch of rows.

    It has metadata builders of its own over the target's attention layers: those of the runner
    are sized for max_num_seqs rows, and an optimisation pass may have more.

    Attributes:
        table_width: blocks of a row of the engine's block table.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        device: torch.device,
        max_rows: int,
        scratch_block: int,
    ) -> None:
        self.max_rows, self.scratch_block = max_rows, scratch_block
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._layer_names = [n for g in kv_cache_config.kv_cache_groups for n in g.layer_names]
        spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
        self.block_size: int = spec.block_size
        self.sink = not isinstance(spec, SlidingWindowSpec)
        self.max_model_len: int = vllm_config.model_config.max_model_len
        self.table_width = get_block_table_width(
            spec.max_num_blocks_per_req(vllm_config, self.max_model_len),
            self.block_size,
            token_alignment=spec.block_table_token_alignment,
        )
        builder_config = copy.copy(vllm_config)
        builder_config.scheduler_config = copy.copy(vllm_config.scheduler_config)
        builder_config.scheduler_config.max_num_seqs = max_rows
        self.attn_groups = init_attn_backend(kv_cache_config, builder_config, device)[0]
        self._layers = sorted(
            ((name, group) for group in self.attn_groups[0] for name in group.layer_names),
            key=lambda layer: extract_layer_index(layer[0]),
        )
        self._query_start_cpu = torch.arange(max_rows + 1, dtype=torch.int32)
        self._query_start = self._query_start_cpu.to(device)
        self._not_prefilling = torch.zeros(max_rows, dtype=torch.bool)

    @contextmanager
    def decode(self, positions: Tensor, block_table: Tensor, max_lengths: Tensor) -> Iterator[object]:
        """See ``PagedAttention.decode``."""
        rows, width = block_table.shape
        queries = len(positions) // rows
        own = block_table if queries == 1 else block_table.repeat_interleave(queries, 0)
        last = (positions // self.block_size).clamp(max=width - 1).unsqueeze(1)
        slots = own.gather(1, last).squeeze(1) * self.block_size + positions % self.block_size
        slots = torch.where(positions < self.max_model_len, slots, PAD_SLOT_ID)
        # A row past the end may have a table that holds fewer tokens.
        limit = min(self.max_model_len, width * self.block_size)
        max_lengths = max_lengths.clamp(max=limit)
        starts, starts_cpu = self._query_start[: rows + 1], self._query_start_cpu[: rows + 1]
        if queries > 1:
            starts, starts_cpu = starts * queries, starts_cpu * queries
        metadata = build_attn_metadata(
            attn_groups=self.attn_groups,
            num_reqs=rows,
            num_tokens=len(positions),
            query_start_loc_gpu=starts,
            query_start_loc_cpu=starts_cpu,
            max_query_len=queries,
            seq_lens=(positions[queries - 1 :: queries] + 1).clamp(max=limit).int(),
            max_seq_len=int(max_lengths.max()),
            block_tables=[block_table],
            slot_mappings=slots.unsqueeze(0),
            kv_cache_config=self._kv_cache_config,
            seq_lens_cpu_upper_bound=max_lengths,
            positions=positions,
            is_prefilling=self._not_prefilling[:rows],
        )
        with (
            eager_kernels(),
            _no_kv_connector(),
            set_forward_context(
                metadata,
                self._vllm_config,
                num_tokens=len(positions),
                slot_mapping=dict.fromkeys(self._layer_names, slots),
            ),
        ):
            yield metadata, slots

    def share_workspace(self, attn_groups: list[list[AttentionGroup]]) -> None:
        """Work in the buffer of the runner's metadata builders, where the backend has one.

        FlashInfer's has some 394 MB, and another would be allocated where vLLM does not count it. Attention
        is computed on one stream, so that the builders of one runner share it as well.
        """
        theirs = [b for groups in attn_groups for group in groups for b in group.metadata_builders]
        own = [b for groups in self.attn_groups for group in groups for b in group.metadata_builders]
        source = next((b for b in theirs if hasattr(b, "_get_workspace_buffer")), None)
        for builder in own:
            if source is not None and hasattr(builder, "set_workspace_buffer"):
                builder.set_workspace_buffer(source._get_workspace_buffer())  # noqa: SLF001 - as vLLM does

    def copy_blocks(self, layer: int, source: Tensor, target: Tensor) -> None:
        """See ``PagedAttention.copy_blocks``."""
        name, group = self._layers[layer]
        cache = self._vllm_config.compilation_config.static_forward_context[name].kv_cache
        if group.kernel_block_size is not None:
            # The kernel splits the manager's blocks: copy all parts of each.
            parts = self.block_size // group.kernel_block_size
            stride, offsets = group.kernel_block_stride or parts, group.kernel_block_offsets
            from_ = (source.view(-1, 1, 1) * stride + offsets).expand(*target.shape, -1)
            to = target.unsqueeze(-1) * stride + offsets
            cache.index_copy_(0, to.flatten(), cache.index_select(0, from_.flatten()))
        elif cache.device.type == "cpu":  # plain copies are several times as fast as indexing by tensors
            for block, copies in zip(source.tolist(), target.tolist(), strict=True):
                cache[copies[0] : copies[-1] + 1] = cache[block]
        else:
            from_ = source.repeat_interleave(target.shape[1])
            cache.index_copy_(0, target.flatten(), cache.index_select(0, from_))


@contextmanager
def _no_kv_connector() -> Iterator[None]:
    """Hide the KV connector from the attention layers, which would hand it what drafts write as if it were to
    be stored, and each layer several times in a step. vLLM does the same for its dummy runs."""
    connector = kv_transfer_state._KV_CONNECTOR_AGENT  # noqa: SLF001
    kv_transfer_state._KV_CONNECTOR_AGENT = None  # noqa: SLF001
    try:
        yield
    finally:
        kv_transfer_state._KV_CONNECTOR_AGENT = connector  # noqa: SLF001
