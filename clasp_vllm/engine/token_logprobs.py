"""``logprob_token_ids`` where drafts are verified: a request's logprobs of tokens that it names.

vLLM leaves them out there, and Model Runner V1 fails beside a request with ordinary logprobs (vLLM PR 44727).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from clasp_vllm.device import to_device


def verify(
    forward: Callable[..., Any], sampler: Any, metadata: Any, draft_probs: Any, logits: Tensor, sampling: Any
) -> Any:
    """Model Runner V1: what ``forward``, vLLM's rejection sampler, returns, with the logprobs asked for.

    Args:
        logits: [num_draft_tokens + num_reqs, vocab] the target's, request by request.
        sampling: vLLM's SamplingMetadata, with ``logprob_token_ids`` by row.
    """
    wanted: dict[int, list[int]] = sampling.logprob_token_ids
    width = max(sampling.max_num_logprobs or 0, *map(len, wanted.values()))
    others = replace(sampling, logprob_token_ids=None, max_num_logprobs=width)
    output = forward(sampler, metadata, draft_probs, logits, others)
    counts = np.array(metadata.num_draft_tokens) + 1
    starts = np.cumsum(counts) - counts
    for row, token_ids in wanted.items():
        tokens = to_device(np.array(token_ids, dtype=np.int64), logits.device)
        scores = logits[starts[row] : starts[row] + counts[row]].float()
        if not sampler.is_logits_logprobs_mode:
            scores = scores.log_softmax(-1)
        first = row * (metadata.max_spec_len + 1)
        rows, columns = slice(first, first + counts[row]), slice(1, 1 + len(token_ids))
        output.logprobs_tensors.logprob_token_ids[rows, columns] = tokens.int()
        output.logprobs_tensors.logprobs[rows, columns] = scores[:, tokens]
    return output


def add_token_logprobs(sampler: Any, output: Any, logits: Tensor, batch: Any) -> None:
    """Model Runner V2: put the logprobs asked for on what its rejection sampler has returned for a batch."""
    from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores

    of_target = sampler.sampler
    width = of_target.logprob_token_ids_state.max_num_token_ids(batch.idx_mapping_np)
    if not width:
        return
    counts = np.diff(batch.cu_num_logits_np)
    rows = to_device(np.repeat(np.arange(len(counts)), counts), logits.device)
    sampled = output.sampled_token_ids[rows, batch.expanded_local_pos.long()]  # what was rejected is not read
    output.logprobs_tensors = compute_topk_scores(
        logits,
        max(of_target.sampling_states.max_num_logprobs(batch.idx_mapping_np), 0),
        sampled.clamp(0, logits.shape[1] - 1),
        batch.cu_num_logits_np.tolist(),
        of_target.logprob_token_ids_state,
        batch.expanded_idx_mapping,
        width,
        of_target.logprobs_mode == "raw_logits",
    )
