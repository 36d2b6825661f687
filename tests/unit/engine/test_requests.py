"""What a request may ask of us."""

from types import SimpleNamespace

import pytest


@pytest.mark.parametrize(
    "extra_args", [None, {}, {"layer_skip": False}, {"layer_skip": True}, {"layer_skip": 0}, {"other": "x"}]
)
def test_what_is_right_or_not_ours_is_let_through(extra_args):
    from clasp_vllm.engine.requests import check_extra_args

    check_extra_args(extra_args)


@pytest.mark.parametrize("value", ["false", "0", 2, -1, 0.0, None, [False], float("nan"), {}, 2**70])
def test_other_values_are_refused(value):
    from vllm.exceptions import VLLMValidationError

    from clasp_vllm.engine.requests import check_extra_args

    with pytest.raises(VLLMValidationError, match="must be true or false") as error:
        check_extra_args({"layer_skip": value})
    assert f"layer_skip={value!r}" in str(error.value)


@pytest.mark.parametrize("key", ["layer_skips", "layer_skip_length", "clasp", "clasp_vllm"])
def test_other_keys_of_ours_are_refused(key):
    from vllm.exceptions import VLLMValidationError

    from clasp_vllm.engine.requests import check_extra_args

    with pytest.raises(VLLMValidationError, match="not known; allowed is layer_skip") as error:
        check_extra_args({key: False})
    assert f"{key}=False" in str(error.value)


@pytest.mark.parametrize("mode", ["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"])
def test_processed_logprobs_of_tokens_that_are_named_are_refused(mode):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    from clasp_vllm.engine.requests import check_logprobs

    check_logprobs(SamplingParams(logprobs=3), mode)
    if mode.startswith("raw"):
        check_logprobs(SamplingParams(logprob_token_ids=[1]), mode)
        return
    with pytest.raises(VLLMValidationError, match=f"logprob_token_ids .* has {mode}"):
        check_logprobs(SamplingParams(logprob_token_ids=[1]), mode)


def test_logprobs_of_tokens_that_are_named_are_refused_where_ranks_share_sampling():
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    from clasp_vllm.engine.requests import check_logprobs

    check_logprobs(SamplingParams(logprobs=3), "raw_logprobs", sharded=True)
    with pytest.raises(VLLMValidationError, match="--enable-batch-sharded-sampling"):
        check_logprobs(SamplingParams(logprob_token_ids=[1]), "raw_logprobs", sharded=True)


def test_a_message_does_not_repeat_all_that_it_was_sent():
    from vllm.exceptions import VLLMValidationError

    from clasp_vllm.engine.requests import check_extra_args

    nested: list = []
    for _ in range(10**5):
        nested = [nested]
    values = ["x" * 10**6, list(range(10**6)), nested, {"a": nested}, 1 << 10**6, -(1 << 10**6)]
    for extra_args in (*({"layer_skip": value} for value in values), {"clasp" + "x" * 10**6: 1}):
        with pytest.raises(VLLMValidationError) as error:
            check_extra_args(extra_args)
        assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("extra_args", "declines"),
    [
        ({"layer_skip": False}, True),
        ({"layer_skip": 0}, True),
        ({"layer_skip": True}, False),
        ({}, False),
        (None, False),
    ],
)
def test_who_declines(extra_args, declines):
    from clasp_vllm.engine.requests import declines_drafts

    params = SimpleNamespace(extra_args=extra_args, thinking_token_budget=None)
    assert declines_drafts(params) == declines
    params.thinking_token_budget = 0
    assert declines_drafts(params)
