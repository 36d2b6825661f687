"""Model Runner V1: our drafter in the place of its draft model."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from clasp_vllm.config import ConfigError
from clasp_vllm.device import to_device
from clasp_vllm.drafting.batch import NgramMatches, SequenceBatch, prompt_tokens
from clasp_vllm.drafting.draft import DraftOutput
from clasp_vllm.drafting.drafter import Drafter
from clasp_vllm.engine.adapters import base_model
from clasp_vllm.engine.build import (
    build_decoder,
    build_drafter,
    first_broadcast,
    log_statistics,
)
from clasp_vllm.engine.draft_sampling_v1 import DraftSampling
from clasp_vllm.engine.requests import declines_drafts
from clasp_vllm.engine.speculative_config import layer_skip_config

_NO_TOKENS = SimpleNamespace(get_token_id=lambda index: -1)  # of a request


class LayerSkipProposer(DraftModelProposer):
    """Drafts with the target's own layers."""

    drafter: Drafter

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> None:
        super().__init__(vllm_config, device, runner)
        self.runner = runner
        config = layer_skip_config(vllm_config)
        assert config is not None
        self._tokens_on_host = device.type == "cpu" and not runner.use_async_scheduling
        # The context has to be on the host when drafting begins.
        self._lookup: Any = None
        self._matches: list[list[int]] | None = None  # of the step that has just been sampled
        if not self._tokens_on_host:
            if config.ngram_cascade:
                raise ConfigError(
                    "ngram_cascade=True: Model Runner V1 can do it on a CPU with --no-async-scheduling only; "
                    "on a GPU Model Runner V2 (VLLM_USE_V2_MODEL_RUNNER=1) can"
                )
        elif config.cascades:
            # Not before it is needed: once numba is loaded, vLLM starts no further engine on a CPU in the
            # same process.
            from clasp_vllm.engine.lookup import PromptLookup

            self._lookup = PromptLookup(vllm_config)

    def load_model(self, target_model: nn.Module) -> None:
        self.model = base_model(target_model)
        self.decoder = build_decoder(self.model)
        first_broadcast(self.device)
        self._draft_attn_layer_names: set[str] = set()

    def initialize_attn_backend(
        self, kv_cache_config: KVCacheConfig, kernel_block_sizes: list[int] | None = None
    ) -> None:
        self.drafter, attention = build_drafter(
            self.vllm_config,
            kv_cache_config,
            self.model,
            self.decoder,
            self.device,
            padded=self.runner.use_async_scheduling,
            drop_stopped=self.device.type == "cpu"
            and self.vllm_config.parallel_config.tensor_parallel_size == 1,
        )
        self.draft_attn_groups = [g for groups in attention.attn_groups for g in groups]
        self.kv_cache_gid = 0
        # Positions that do not fit are handled row by row; the runner would drop the whole batch.
        self.runner.effective_drafter_max_model_len = (
            self.max_model_len + self.speculative_config.num_speculative_tokens + 1
        )

    def initialize_cudagraph_keys(self, cudagraph_mode: CUDAGraphMode) -> None:
        """No graphs of our own."""

    def dummy_run(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to warm up. Block tables are stale here, so nothing may be written."""

    def prepare_next_token_ids_padded(
        self,
        sampled_token_ids: Tensor,
        requests: dict[str, CachedRequestState],
        gpu_input_batch: InputBatch,
        discard_request_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """But for rows that have not sampled, of which we read nothing: vLLM would ask for tokens of their
        prompts, which prompts given as embeddings do not have."""
        no_tokens = dict.fromkeys(requests, _NO_TOKENS)
        return super().prepare_next_token_ids_padded(
            sampled_token_ids, no_tokens, gpu_input_batch, discard_request_mask
        )

    def idles(self, num_tokens: int, sampled: Tensor | list[list[int]], lengths: Tensor) -> bool:
        """Whether nothing is to be drafted or learnt after a step, so that nothing need be prepared for it.

        Args:
            num_tokens: that the step ran.
            sampled: [num_reqs, 1] int tokens, if it verified no drafts; a list with unpadded drafts.
            lengths: [num_reqs] int of the sequences without these.
        """
        batch = self.runner.input_batch
        plain = num_tokens == batch.num_reqs and not self.runner.use_async_scheduling
        if not plain or isinstance(sampled, list) or not self.drafter.may_idle(batch.req_ids):
            return False
        if self.runner.discard_request_mask.np[: batch.num_reqs].any():
            return False
        self._matches = self._look_up(sampled.flatten(), lengths, range(batch.num_reqs))
        if self._matches is not None and any(self._matches):
            return False
        self._matches = None
        return self.drafter.idles(batch.req_ids)

    def propose(  # noqa: PLR0913 - vLLM's signature
        self,
        num_speculative_tokens: int,
        target_token_ids: Tensor,
        target_positions: Tensor,
        target_hidden_states: Tensor,
        next_token_ids: Tensor,  # [num_reqs]
        token_indices_to_sample: Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        mm_embed_inputs: Any = None,
        num_rejected_tokens_gpu: Tensor | None = None,  # [num_reqs]
        slot_mappings: Any = None,
    ) -> Tensor | list[list[int]]:
        """[num_reqs, num_speculative_tokens] drafts; a list of shorter ones where the runner can."""
        self._last_draft_probs = None
        num_reqs = common_attn_metadata.batch_size()
        drafts = next_token_ids.new_zeros(num_reqs, num_speculative_tokens, dtype=torch.int64)
        request_ids = self.runner.input_batch.req_ids[:num_reqs]
        # Rows that have not sampled yet (chunked prefill) neither draft nor write.
        rows = np.flatnonzero(~self.runner.discard_request_mask.np[:num_reqs])
        positions = common_attn_metadata.seq_lens[:num_reqs].long()
        if num_rejected_tokens_gpu is not None:
            positions = positions - num_rejected_tokens_gpu
        matches, self._matches = self._matches, None
        if matches is None:
            matches = self._look_up(next_token_ids, positions, rows)
        plain = rows.size == num_reqs == common_attn_metadata.num_actual_tokens
        if plain and self.runner.use_async_scheduling and self.drafter.idles(request_ids):
            return drafts
        ends = common_attn_metadata.query_start_loc_cpu[: num_reqs + 1].numpy()
        self.drafter.observe(request_ids, ends[1:] - ends[:-1], num_rejected_tokens_gpu)
        nothing = self._tokens_on_host and rows.size == num_reqs and not any(matches or ())
        if nothing and self.drafter.idles(request_ids):
            return [[] for _ in request_ids]
        self._read_prompts(request_ids, target_hidden_states, ends)
        running = [request_ids[row] for row in rows]
        rows = rows[[not self._declines(row) for row in rows]]
        room, stop_tokens = np.full(rows.size, num_speculative_tokens), self._stop_tokens(request_ids)
        if self._tokens_on_host:
            room = np.minimum(room, self._room(request_ids, next_token_ids, positions, rows, stop_tokens))
            rows, room = rows[room > 0], room[room > 0]
        output = None
        if rows.size:
            batch = self._batch(
                rows, next_token_ids, positions, common_attn_metadata, matches, stop_tokens, running
            )
            sampling = DraftSampling(self, rows, num_reqs, sampling_metadata)
            output = self.drafter.draft(batch, int(room.max()), sampling.sample)
            if output is not None and not sampling.greedy:
                # They may be what memory does not suffice for.
                self._last_draft_probs = self.drafter.guarded(partial(sampling.distribution, output))
                output = None if self._last_draft_probs is None else output
            log_statistics(self.drafter)
        if output is not None:
            drafts[to_device(rows, self.device), : output.tokens.shape[1]] = output.tokens
        if self.runner.use_async_scheduling:
            return drafts  # the verification is under way: without drafts any tokens will do
        return _worth_verifying(output, rows, room, stop_tokens)

    def _read_prompts(self, request_ids: list[str], hidden: Tensor, ends: np.ndarray) -> None:
        if self.drafter.policy.reads_prompts:
            inputs, num_reqs = self.runner.input_batch, len(request_ids)
            spans = ends, inputs.num_computed_tokens_cpu[:num_reqs], inputs.num_prompt_tokens[:num_reqs]
            self.drafter.read(prompt_tokens(request_ids, hidden, *spans))

    def _stop_tokens(self, request_ids: list[str]) -> list[set[int]]:
        """[reqs] what ends each answer. Before ``min_tokens`` the target takes none, so no draft goes on."""
        params = (self.runner.requests[request_id].sampling_params for request_id in request_ids)
        return [{of.eos_token_id, *(of.stop_token_ids or ())} for of in params]

    def _declines(self, row: int) -> bool:
        """Whether the request wants no drafts."""
        request_id = self.runner.input_batch.req_ids[row]
        return declines_drafts(self.runner.requests[request_id].sampling_params)

    def _room(
        self,
        request_ids: list[str],
        next_token_ids: Tensor,
        positions: Tensor,
        rows: np.ndarray,
        stop_tokens: list[set[int]],
    ) -> np.ndarray:
        """[rows] int, draft tokens that may still get into each answer; 0 after a token that ends it."""
        last, inputs = positions.numpy()[rows], self.runner.input_batch
        made = last + 1 - inputs.num_prompt_tokens[rows]
        # Drafts end with a token that ends the answer: such a one was sampled last, or is the last accepted.
        pairs = zip(inputs.token_ids_cpu[rows, last - 1].tolist(), next_token_ids[rows].tolist(), strict=True)
        room = np.zeros(rows.size, dtype=np.int64)
        for i, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
            if stop_tokens[row].isdisjoint(pair[-made[i] :]):  # of the answer
                params = self.runner.requests[request_ids[row]].sampling_params
                room[i] = (params.max_tokens or self.max_model_len) - made[i] - 1  # the target adds one
                if made[i] < params.min_tokens:
                    # vLLM counts no drafts where it keeps the token after them from ending the answer.
                    room[i] = min(room[i], params.min_tokens - 1 - made[i])
        return room

    def _batch(
        self,
        rows: np.ndarray,
        next_token_ids: Tensor,
        positions: Tensor,
        common_attn_metadata: CommonAttentionMetadata,
        matches: list[list[int]] | None,
        stop_tokens: list[set[int]],
        running: list[str],
    ) -> SequenceBatch:
        """The ``rows`` to draft for, of all requests of the step; ``running``: those that have sampled."""
        num_reqs = len(positions)
        request_ids = self.runner.input_batch.req_ids[:num_reqs]
        max_lengths = common_attn_metadata.seq_lens_cpu_upper_bound
        if max_lengths is None:
            max_lengths = torch.full((num_reqs,), self.max_model_len, dtype=torch.int32)
        greedy = self.runner.input_batch.greedy_reqs
        return SequenceBatch(
            request_ids,
            next_token_ids,
            positions,
            common_attn_metadata.block_table_tensor[:num_reqs],
            max_lengths[:num_reqs] + 1,
            np.array([request_id not in greedy for request_id in request_ids]),
            None if matches is None else NgramMatches.of(matches, self._lookup.longest),
            stop_tokens,
            running,
        ).select(rows)

    @property
    def draws(self) -> bool:
        """Whether draft tokens of sampling requests are drawn, not the likeliest."""
        return self._enable_probabilistic_draft_probs

    def draw(self, logits: Tensor, metadata: SamplingMetadata) -> tuple[Tensor, Tensor | None]:
        """[rows] tokens and, where they are drawn, [rows, vocab] float32, their distributions."""
        return self._sample_from_logits(logits, metadata)

    def _look_up(self, next_tokens: Tensor, positions: Tensor, rows: Iterable[int]) -> list[list[int]] | None:
        """By request, prompt-lookup matches of those of ``rows`` that want drafts; None: not known."""
        if self._lookup is None:
            return None
        return self.drafter.guarded(lambda: self._matches_of(next_tokens.tolist(), positions.tolist(), rows))

    def _matches_of(
        self, next_tokens: list[int], positions: list[int], rows: Iterable[int]
    ) -> list[list[int]]:
        # Loops, not arrays: for a few requests they take less.
        tokens, num_reqs = self.runner.input_batch.token_ids_cpu, self.runner.input_batch.num_reqs
        lengths = [position + 1 for position in positions[:num_reqs]]
        rows = [row for row in rows if lengths[row] <= self.max_model_len and not self._declines(row)]
        for row in rows:
            # Drafts are in the array already, and those accepted are followed by the sampled token, which
            # the runner will put in the same place when drafting is done.
            tokens[row, lengths[row] - 1] = next_tokens[row]
        return self._lookup.matches(rows, lengths, tokens)


def _worth_verifying(
    output: DraftOutput | None, rows: np.ndarray, room: np.ndarray, stop_tokens: list[set[int]]
) -> list[list[int]]:
    """By request, the tokens for a scheduler that waits for them: no more than are worth verifying."""
    short: list[list[int]] = [[] for _ in stop_tokens]
    if output is not None:
        lengths = np.minimum(output.lengths.numpy(force=True), room).tolist()
        for row, ids, length in zip(rows, output.tokens.tolist(), lengths, strict=True):
            ends = (i for i, token in enumerate(ids[:length], 1) if token in stop_tokens[row])
            short[row] = ids[: next(ends, length)]
    return short
