"""What a request may ask of us: in ``vllm_xargs`` over HTTP, in ``SamplingParams.extra_args`` offline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from clasp_vllm.config.parsing import short_repr

KEY = "layer_skip"
PREFIXES = ("layer_skip", "clasp")  # further keys that begin so are mistakes, not another plugin's


def check_extra_args(extra_args: Mapping[str, Any] | None) -> None:
    """Raises VLLMValidationError, over HTTP a response with status 400, where a request asks wrongly.

    vLLM's API hands JSON's false and true on as 0 and 1.
    """
    for key, value in (extra_args or {}).items():
        if key == KEY:
            problem = None if isinstance(value, int) and value in (0, 1) else "must be true or false"
        else:
            problem = f"is not known; allowed is {KEY}" if key.startswith(PREFIXES) else None
        if problem is not None:
            raise VLLMValidationError(f"{key:.40}={short_repr(value):.80} {problem}", parameter="vllm_xargs")


def check_logprobs(params: SamplingParams, logprobs_mode: str, sharded: bool | None = False) -> None:
    """Raises VLLMValidationError where a request asks for logprobs that are not to be had beside drafts.

    ``sharded``: whether each rank samples for a share of the requests.
    """
    if params.logprob_token_ids and sharded:
        raise VLLMValidationError(
            "logprob_token_ids with layer skipping needs a server without --enable-batch-sharded-sampling",
            parameter="logprob_token_ids",
        )
    if params.logprob_token_ids and logprobs_mode.startswith("processed"):
        raise VLLMValidationError(
            f"logprob_token_ids with layer skipping needs --logprobs-mode raw_logprobs or raw_logits, and "
            f"the server has {logprobs_mode}",
            parameter="logprob_token_ids",
        )


def declines_drafts(params: SamplingParams | None) -> bool:
    """Whether a request is to be left out of drafting: it asks for that, or has a thinking budget.

    vLLM counts the tokens of reasoning otherwise where drafts are verified than where there are none.
    """
    if params is None:
        return False
    return params.thinking_token_budget is not None or not (params.extra_args or {}).get(KEY, True)


def has_grammar(params: SamplingParams | None) -> bool:
    """Whether a request's drafts must not be drawn, but be the likeliest tokens: its output is structured.

    What its grammar forbids of a draft is put aside, and so by what was drawn. That is exact only for tokens
    that count as certain.
    """
    return params is not None and params.structured_outputs is not None
