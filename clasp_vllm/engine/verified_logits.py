"""Model Runner V1: ``min_p`` and ``logit_bias`` where drafts are verified.

vLLM leaves both out with any speculation: its sampler could apply them to the token after a draft, but its
rejection sampler does not apply them to the tokens of a draft. Model Runner V2's applies them to all.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import (
    BUILTIN_LOGITS_PROCESSORS,
    LOGITSPROCS_GROUP,
    LogitBiasLogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata

from clasp_vllm.config import ConfigError
from clasp_vllm.device import to_device


def builtin_processors(vllm_config: VllmConfig, device: torch.device, pin_memory: bool) -> LogitsProcessors:
    """vLLM's own logits processors, all that it has without speculation.

    Raises:
        ConfigError: a package brings others, which could not be applied to drafts.
    """
    names = [entry_point.name for entry_point in entry_points(group=LOGITSPROCS_GROUP)]
    if names:
        raise ConfigError(
            f"layer skipping does not support custom logits processors ({', '.join(names)}) with Model "
            "Runner V1: use V2 (VLLM_USE_V2_MODEL_RUNNER=1), or uninstall the package that brings them"
        )
    return LogitsProcessors(kind(vllm_config, device, pin_memory) for kind in BUILTIN_LOGITS_PROCESSORS)


def add_logit_bias(logits: Tensor, metadata: SamplingMetadata, counts: Sequence[int]) -> None:
    """Add each request's ``logit_bias``, in place.

    Args:
        logits: [num_draft_tokens, vocab] float32, the target's for every draft token, request by request.
        counts: [num_reqs], draft tokens of each request.
    """
    ends = np.cumsum(counts)
    for processor in metadata.logitsprocs.non_argmax_invariant:
        if not isinstance(processor, LogitBiasLogitsProcessor):
            continue
        for row, biases in processor.biases.items():
            of_request = logits[ends[row] - counts[row] : ends[row]]
            tokens = to_device(np.array(list(biases), dtype=np.int64), logits.device)
            of_request[:, tokens] += to_device(np.array(list(biases.values()), np.float32), logits.device)


def apply_min_p(logits: Tensor, metadata: SamplingMetadata, counts: Sequence[int]) -> None:
    """Rule out what each request's ``min_p`` rules out at its temperature, in place.

    Args:
        logits: [num_draft_tokens, vocab] float32, before the temperature.
        counts: [num_reqs], draft tokens of each request.
    """
    if metadata.temperature is None:  # all are greedy, and min_p leaves the likeliest token
        return
    for processor in metadata.logitsprocs.argmax_invariant:
        if not isinstance(processor, MinPLogitsProcessor) or not processor.min_p_count:
            continue
        request = to_device(np.repeat(np.arange(len(counts)), counts), logits.device)
        temperature = metadata.temperature.masked_fill(metadata.temperature == 0, 1.0)[request]
        probs = (logits / temperature.unsqueeze(1)).softmax(-1)
        logits.masked_fill_(probs < probs.amax(-1, keepdim=True) * processor.min_p[request], -torch.inf)
