"""Model Runner V2: our drafter as a speculator."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from clasp_vllm.device import rows_index, to_device
from clasp_vllm.drafting.batch import NgramMatches, SequenceBatch, prompt_tokens
from clasp_vllm.drafting.draft import Sample
from clasp_vllm.drafting.drafter import Drafter
from clasp_vllm.drafting.passes import finite
from clasp_vllm.engine.adapters import base_model
from clasp_vllm.engine.build import (
    any_rank,
    build_decoder,
    build_drafter,
    first_broadcast,
    log_statistics,
)
from clasp_vllm.engine.graphs import CaptureError, DraftGraphs
from clasp_vllm.engine.speculative_config import layer_skip_config

logger = init_logger(f"vllm.{__name__}")

# Those whose metadata for decoding is made on the device alone.
CAPTURED_BACKENDS = {"FLASH_ATTN", "TRITON_ATTN"}
# Arguments of every speculator that the lookup in the context does not read.
UNREAD = (
    "attn_metadata",
    "slot_mappings",
    "last_hidden_states",
    "aux_hidden_states",
    "num_rejected",
    "next_prefill_tokens",
    "temperature",
    "seeds",
)


class LayerSkipSpeculator(DraftModelSpeculator):
    """Drafts with the target's own layers."""

    drafter: Drafter

    def __init__(self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState) -> None:
        super().__init__(vllm_config, device)
        config = layer_skip_config(vllm_config)
        assert config is not None
        # Not by default, for what it gains here has not been measured.
        self._lookup = NgramGPUSpeculator(vllm_config, device, req_states) if config.ngram_cascade else None
        self._nothing = torch.full((self.max_num_reqs, 1), -1, dtype=torch.int64, device=device)
        self.declined = np.zeros(self.max_num_reqs, dtype=bool)  # by slot, requests that want no drafts
        self.structured = np.zeros(self.max_num_reqs, dtype=bool)  # by slot, requests with a grammar
        self._confidence: Tensor | None = None
        self._exact: np.ndarray | None = None  # see ``Passes.logits``
        self.graphs: DraftGraphs | None = None  # here, for vLLM's memory profile to find and drop them
        self._step = torch.zeros((), dtype=torch.int64, device=device)

    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        model = base_model(target_model)
        self.decoder = build_decoder(model)
        first_broadcast(self.device)
        return model

    def set_attn(
        self,
        model_state: Any,
        kv_cache_config: KVCacheConfig,
        block_tables: BlockTables,
        target_input_buffers: Any,
        target_attn_groups: list[list[AttentionGroup]],
    ) -> None:
        # The base class would build metadata for draft layers, of which there are none.
        self.block_tables = block_tables
        self.drafter, attention = build_drafter(
            self.vllm_config,
            kv_cache_config,
            self.model,
            self.decoder,
            self.device,
            padded=True,
            graphs=lambda: self.graphs,
        )
        attention.share_workspace(target_attn_groups)
        self.attn_groups = attention.attn_groups
        self._attention, self._num_blocks = attention, kv_cache_config.num_blocks

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        self.graphs = None
        if self.device.type != "cuda" or not cudagraph_mode.has_full_cudagraphs():
            return
        backends = {group.backend.get_name() for groups in self.attn_groups for group in groups}
        if backends <= CAPTURED_BACKENDS:
            self.graphs = DraftGraphs(
                self.vllm_config,
                self.device,
                cudagraph_mode,
                self.drafter.passes.draft_decoder,
                self.drafter.passes,
                self._attention,
                self._num_blocks,
            )
        else:
            others = ", ".join(sorted(backends - CAPTURED_BACKENDS))
            logger.warning_once(
                "Layer skipping drafts without CUDA graphs, and so hardly pays, with attention backend %s; "
                "with --attention-backend FLASH_ATTN or TRITON_ATTN it has them",
                others,
            )

    def capture(self) -> None:
        """Capture draft steps; where that does not give what eager calls give, go on with those."""
        graphs = self.graphs
        if graphs is None:
            return
        try:
            graphs.capture_drafts()
            mismatch = graphs.mismatch()
        except CaptureError as error:
            # Drafts can do without: eager calls of the same steps have just worked. All else ends the start.
            if get_tp_group().world_size > 1:
                raise  # other ranks would wait for this one for ever
            torch.cuda.synchronize()  # raises if the device does not work any more
            logger.warning("Layer skipping drafts without CUDA graphs: %s", error, exc_info=error)
            self.graphs = None
            return
        if any_rank(mismatch is not None):  # ranks must run the same kernels, or they hang
            reason = mismatch or "what they compute on another rank is off"
            logger.warning("Layer skipping drafts without CUDA graphs: %s", reason)
            self.graphs = None

    def compute_draft_logits(self, hidden_states: Tensor, spec_step_idx: int) -> Tensor:
        # The confidence now, for sampling may overwrite the logits.
        logits, self._confidence = self.drafter.passes.head(hidden_states, self._exact)
        return logits if self.draft_logits is None else finite(logits)

    @torch.inference_mode()
    def propose(  # noqa: PLR0913 - vLLM's signature
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Tensor,
        aux_hidden_states: Any,
        num_sampled: Tensor,
        num_rejected: Tensor,  # [num_reqs]
        last_sampled: Tensor,  # [max_num_reqs, 1]
        next_prefill_tokens: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> Tensor:
        """[num_reqs, num_speculative_steps] drafts."""
        # Long by the number of vLLM's arguments.
        num_reqs = input_batch.num_reqs
        num_tokens = self.num_speculative_steps if num_speculative_tokens is None else num_speculative_tokens
        drafts = self.draft_tokens[:num_reqs]
        # Rows that have not sampled yet (chunked prefill) neither draft nor write, and in a dummy
        # run the block tables are stale.
        computed = input_batch.num_computed_tokens_np + input_batch.num_scheduled_tokens
        rows = np.flatnonzero(computed[:num_reqs] >= input_batch.prefill_len_np[:num_reqs])
        if dummy_run:  # nor is there anything to learn
            return drafts.zero_()
        scheduled = input_batch.num_scheduled_tokens[:num_reqs]
        plain = not num_tokens and self._lookup is None and rows.size == num_reqs == scheduled.sum()
        if plain and self.drafter.idles(input_batch.req_ids):
            return drafts.zero_()
        self.drafter.observe(input_batch.req_ids, scheduled, num_rejected)
        if self.drafter.policy.reads_prompts:
            ends = np.concatenate(([0], np.cumsum(scheduled)))
            spans = ends, input_batch.num_computed_tokens_np[:num_reqs], input_batch.prefill_len_np[:num_reqs]
            self.drafter.read(prompt_tokens(input_batch.req_ids, last_hidden_states, *spans))
        running = [input_batch.req_ids[row] for row in rows]
        rows = rows[~self.declined[input_batch.idx_mapping_np[rows]]]
        if rows.size == 0:
            return drafts.zero_()

        self._copy_request_inputs(num_reqs, input_batch.idx_mapping, temperature, seeds)
        structured = self._draft_greedily(input_batch.idx_mapping_np[rows])
        batch = SequenceBatch(
            input_batch.req_ids,
            last_sampled.view(-1)[input_batch.idx_mapping],
            (input_batch.seq_lens[:num_reqs] - num_rejected).long(),
            self.block_tables.input_block_tables[0][:num_reqs],
            input_batch.seq_lens_cpu_upper_bound[:num_reqs] + 1,
            ngrams=self.drafter.guarded(lambda: self._looked_up(input_batch, num_sampled)),
            running=running,
        ).select(rows)
        on_device = to_device(rows, self.device)
        idx_mapping = input_batch.idx_mapping[on_device]
        output = self.drafter.draft(batch, num_tokens, self._sampler(idx_mapping))
        drafts.zero_()
        if output is None:
            # All that the verification under way needs is tokens with known draft probabilities.
            drawn = np.full((rows.size, num_tokens), -1)
        else:
            drawn = output.drawn
            drawn[structured] = -1
            drafts[on_device, :num_tokens] = output.tokens
        if self.draft_logits is not None:
            self._mark_certain(idx_mapping, drawn < 0, drafts[on_device])
        log_statistics(self.drafter)
        return drafts

    def _draft_greedily(self, slots: np.ndarray) -> np.ndarray:
        """[rows] bool, which requests are not to have drafts drawn: those with a grammar."""
        structured = self.structured[slots]
        if self.draft_logits is not None and structured.any():
            self.temperature[to_device(slots[structured], self.device)] = 0.0
        return structured

    def _sampler(self, idx_mapping: Tensor) -> Sample:
        """Samples draft tokens for [rows] requests; ``idx_mapping`` are their slots."""

        def sample(
            hidden: Tensor, positions: Tensor, step: int, rows: np.ndarray, exact: np.ndarray | None = None
        ) -> tuple[Tensor, Tensor | None]:
            self._exact = exact
            tokens = self.sample_draft(
                hidden,
                positions,
                idx_mapping[rows_index(rows, len(idx_mapping), self.device)],
                self.temperature,
                self.seeds,
                self._step.fill_(step),
                self.draft_logits,
                step,
            )
            return tokens, self._confidence if self.drafter.asks_confidence else None

        return sample

    def _looked_up(self, input_batch: InputBatch, num_sampled: Tensor) -> NgramMatches | None:
        """Prompt-lookup matches of the batch."""
        if self._lookup is None:
            return None
        # It fills up with what it takes for the last sampled tokens where it finds less than a whole draft.
        tokens = self._lookup.propose(
            input_batch, num_sampled=num_sampled, last_sampled=self._nothing, **dict.fromkeys(UNREAD)
        )
        return NgramMatches(tokens.clamp(min=0), (tokens >= 0).sum(1))

    def _mark_certain(self, idx_mapping: Tensor, certain: np.ndarray, tokens: Tensor) -> None:
        """Tokens that were not drawn, but looked up or fill up a draft: all draft probability is on them.

        The rejection sampler weighs each token by the distribution it was drawn from; what is stored for
        these steps is another round's.

        Args:
            idx_mapping: [rows].
            certain: [rows, steps] bool.
            tokens: [rows, steps] int64.
        """
        assert self.draft_logits is not None
        rows, steps = (to_device(indices, self.device) for indices in np.nonzero(certain))
        self.draft_logits[idx_mapping[rows], steps] = -torch.inf
        self.draft_logits[idx_mapping[rows], steps, tokens[rows, steps]] = 0.0
