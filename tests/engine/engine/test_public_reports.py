"""What others have reported of speculative decoding in vLLM, where no other file is about it."""

import pytest
from engines import PROMPTS, engine_process, force_async_scheduling, generate, model_runner, running

CLASP = {"method": "clasp", "adaptive": False, "num_speculative_tokens": 4, "draft_exit_threshold": 0.0}


def long_drafts(speculative_config: object) -> list[list[int]]:
    """Answers to more requests than there is room to verify in one step, with the longest drafts."""
    limits = {"max_num_seqs": 256, "max_num_batched_tokens": 2048}
    with running(speculative_config=speculative_config, **limits) as llm:
        return generate(llm, PROMPTS * 3, max_tokens=80).token_ids


@pytest.mark.slow
def test_the_longest_drafts_of_many_requests():
    """vLLM issue 50708: a negative number of tokens to schedule."""
    with engine_process("v1") as call:
        config = CLASP | {"num_speculative_tokens": 64, "num_skipped_layers": 2}
        assert call(long_drafts, config) == call(long_drafts, None)


def least_token_id(speculative_config: object) -> tuple[list[list[int]], int]:
    """Answers where not all requests fit into a step, and the least token id that the model was given."""
    force_async_scheduling()
    limits = {"max_num_batched_tokens": 16, "max_num_seqs": 8, "block_size": 32}
    with running(speculative_config=speculative_config, **limits) as llm:
        given: list[int] = []
        embedding = model_runner(llm).model.model.embed_tokens
        embedding.register_forward_pre_hook(lambda _, inputs: given.append(int(inputs[0].min())))
        token_ids = generate(llm, PROMPTS[:8], max_tokens=24).token_ids
        return token_ids, min(given)


@pytest.mark.parametrize("runner", ["v1", pytest.param("v2", marks=pytest.mark.slow)])
def test_placeholders_never_reach_the_model(runner):
    """vLLM issue 46899: -1 did, of a request that was left out of a step for want of room."""
    with engine_process(runner) as call:
        plain, _ = call(least_token_id, None)
        ours, least = call(least_token_id, CLASP)
    assert ours == plain
    assert least >= 0
