"""The hooks of a worker that uses us, of the ledger in ``hooks``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clasp_vllm.engine.hooks import drafter_of, uses_us, wrap


def install_runner_hooks(v2: bool) -> None:
    """Install the hooks of a worker that uses us, before it builds its model runner."""
    if v2:
        import vllm.v1.worker.gpu.model_runner as runner
        import vllm.v1.worker.gpu.spec_decode as spec_decode
        from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager
        from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

        wrap(spec_decode, "init_speculator", _speculator_v2)
        wrap(runner, "init_speculator", _speculator_v2)  # it imported the function by name
        wrap(runner.GPUModelRunner, "add_requests", _add_requests)
        wrap(runner.GPUModelRunner, "sample_tokens", _sample_tokens)
        wrap(RejectionSampler, "__call__", _token_logprobs)
        wrap(ModelCudaGraphManager, "_init_candidates", _target_graphs)
    else:
        import vllm.v1.sample.rejection_sampler as rejection_sampler
        import vllm.v1.worker.gpu_model_runner as runner
        from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder
        from vllm.v1.spec_decode.draft_model import DraftModelProposer

        wrap(DraftModelProposer, "__new__", _proposer_v1)
        wrap(rejection_sampler, "expand_batch_to_tokens", _expand_batch)
        wrap(rejection_sampler.RejectionSampler, "forward", _sample)
        wrap(rejection_sampler.RejectionSampler, "apply_logits_processors", _verified_logits)
        wrap(ThinkingBudgetStateHolder, "apply_to_logits", _thinking_budget)
        wrap(runner, "build_logitsprocs", _logits_processors)  # it imported the function by name
        wrap(runner.GPUModelRunner, "propose_draft_token_ids", _propose)
        wrap(runner.GPUModelRunner, "sample_tokens", _sample_tokens)


def install_draft_weights() -> None:
    """Install the hooks of a worker that quantises weights for drafts."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    wrap(UnquantizedLinearMethod, "process_weights_after_loading", _draft_weights)
    wrap(UnquantizedEmbeddingMethod, "process_weights_after_loading", _draft_weights)


def _draft_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm.config.vllm import get_current_vllm_config_or_none

    from clasp_vllm.engine.draft_weights import keep_draft_weight

    def process_weights_after_loading(self: Any, layer: Any) -> None:
        keep_draft_weight(layer, get_current_vllm_config_or_none())
        original(self, layer)

    return process_weights_after_loading


def _sample_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    from clasp_vllm.engine.metrics import send_counts

    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        if not uses_us(self.vllm_config):
            return output
        return send_counts(drafter_of(self), output, self)

    return sample_tokens


def _speculator_v2(original: Callable[..., Any]) -> Callable[..., Any]:
    def init_speculator(vllm_config: Any, device: Any, req_states: Any) -> Any:
        if not uses_us(vllm_config):
            return original(vllm_config, device, req_states)
        from clasp_vllm.engine.speculator_v2 import LayerSkipSpeculator

        return LayerSkipSpeculator(vllm_config, device, req_states)

    return init_speculator


def _add_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    from clasp_vllm.engine.requests import declines_drafts, has_grammar

    def add_requests(self: Any, scheduler_output: Any) -> None:
        original(self, scheduler_output)
        if uses_us(self.vllm_config):
            for request in scheduler_output.scheduled_new_reqs:
                slot = self.req_states.req_id_to_index[request.req_id]
                self.speculator.declined[slot] = declines_drafts(request.sampling_params)
                self.speculator.structured[slot] = has_grammar(request.sampling_params)

    return add_requests


def _token_logprobs(original: Callable[..., Any]) -> Callable[..., Any]:
    from clasp_vllm.engine.token_logprobs import add_token_logprobs

    def __call__(self: Any, logits: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, logits, input_batch, *args, **kwargs)
        add_token_logprobs(self, output, logits, input_batch)
        return output

    return __call__


def _target_graphs(original: Callable[..., Any]) -> Callable[..., Any]:
    def _init_candidates(self: Any) -> None:
        original(self)
        if uses_us(self.vllm_config):
            from clasp_vllm.engine.target_graphs import cover_draft_lengths

            cover_draft_lengths(self)

    return _init_candidates


def _proposer_v1(original: Callable[..., Any]) -> Callable[..., Any]:
    def __new__(cls: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        if uses_us(vllm_config):
            # A subclass, so that the runner's isinstance checks hold.
            from clasp_vllm.engine.proposer_v1 import LayerSkipProposer

            cls = LayerSkipProposer
        return object.__new__(cls)

    return __new__


def _expand_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    def expand_batch_to_tokens(
        x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> Any:
        if x.device.type != "cpu":
            return original(x, cu_num_tokens, num_tokens, replace_from, replace_to)
        # vLLM's CPU kernel fills a copy and leaves the result as it was allocated.
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts, output_size=num_tokens)

    return expand_batch_to_tokens


def _sample(original: Callable[..., Any]) -> Callable[..., Any]:
    from clasp_vllm.engine.token_logprobs import verify

    def forward(self: Any, metadata: Any, draft_probs: Any, logits: Any, sampling_metadata: Any) -> Any:
        if metadata.max_spec_len == 0:  # then the logits are one row for each request, as without speculation
            return self.sampler(logits=logits, sampling_metadata=sampling_metadata)
        if sampling_metadata.logprob_token_ids:
            return verify(original, self, metadata, draft_probs, logits, sampling_metadata)
        return original(self, metadata, draft_probs, logits, sampling_metadata)

    return forward


def _thinking_budget(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_to_logits(self: Any, logits: Any, predict_bonus_token: bool, spec_token_ids: Any) -> Any:
        if self.in_spec_mode and not predict_bonus_token and not any(spec_token_ids or ()):
            spec_token_ids = [[0]] * len(logits)  # a row for each request, of which vLLM counts none
        for state in self._state.values():
            if not state["in_end"]:
                state["bonus_token_forced"] = False  # by an earlier end of reasoning
        return original(self, logits, predict_bonus_token, spec_token_ids)

    return apply_to_logits


def _logits_processors(original: Callable[..., Any]) -> Callable[..., Any]:
    from clasp_vllm.engine.verified_logits import builtin_processors

    def build_logitsprocs(
        vllm_config: Any,
        device: Any,
        is_pin_memory: bool,
        is_pooling_model: bool,
        custom_logitsprocs: Any = (),
    ) -> Any:
        if custom_logitsprocs or not uses_us(vllm_config):  # vLLM refuses custom ones with any speculation
            return original(vllm_config, device, is_pin_memory, is_pooling_model, custom_logitsprocs)
        return builtin_processors(vllm_config, device, is_pin_memory)

    return build_logitsprocs


def _verified_logits(original: Callable[..., Any]) -> Callable[..., Any]:
    from clasp_vllm.engine.verified_logits import add_logit_bias, apply_min_p

    def apply_logits_processors(self: Any, logits: Any, sampling_metadata: Any, metadata: Any) -> Any:
        add_logit_bias(logits, sampling_metadata, metadata.num_draft_tokens)  # penalties scale it
        logits = original(self, logits, sampling_metadata, metadata)
        apply_min_p(logits, sampling_metadata, metadata.num_draft_tokens)
        return logits

    return apply_logits_processors


def _propose(original: Callable[..., Any]) -> Callable[..., Any]:
    def propose_draft_token_ids(self: Any, scheduler_output: Any, sampled: Any, *args: Any) -> Any:
        if uses_us(self.vllm_config):
            lengths = args[-2].seq_lens  # of common_attn_metadata
            if self.drafter.idles(scheduler_output.total_num_scheduled_tokens, sampled, lengths):
                return [[] for _ in range(self.input_batch.num_reqs)]
        return original(self, scheduler_output, sampled, *args)

    return propose_draft_token_ids
