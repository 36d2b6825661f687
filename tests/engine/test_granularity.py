"""CLaSp over sub-layers: lossless, and its masks cost what the budget says."""

import pytest
from engines import PROMPTS, Outcome, change_costs, drafter, engine_process, generate, running

from clasp_vllm.skipping.skip_units import UNITS

CLASP = {
    "method": "clasp",
    "adaptive": False,
    "granularity": "sublayer",
    "num_skipped_layers": 12,
    "num_speculative_tokens": 4,
    "optimization_interval": 2,
    "max_optimized_requests": 2,
    "draft_exit_threshold": 0.0,
}


LONG = "Here is some text that all requests begin with, so that there is much to read again. " * 9


def cost_of(mask: list[int], costs: tuple[int, ...]) -> int:
    return sum(cost for cost, skipped in zip(costs, mask, strict=True) if skipped)


def plain_outcome(count: int, tokens: int) -> Outcome:
    with running(max_num_seqs=8) as llm:
        return generate(llm, PROMPTS[:count], max_tokens=tokens)


def clasp_outcome(config: dict, count: int, tokens: int) -> tuple[Outcome, list, tuple[int, ...]]:
    """What was generated, the masks of sequences that have found their own, and the costs of the items."""
    with running(speculative_config=config, max_num_seqs=8) as llm:
        ours = drafter(llm)
        if ours.adaptive is not None:
            change_costs(llm)  # the machine's own costs might say never to draft
        outcome = generate(llm, PROMPTS[:count], max_tokens=tokens)
        masks = ours.sequences.masks[ours.sequences.has_own]
        return outcome, masks[:, -1].flatten(1).int().tolist(), ours.policy._items.costs


@pytest.mark.parametrize(
    ("runner", "count", "tokens"), [("v1", 8, 32), pytest.param("v2", 3, 12, marks=pytest.mark.slow)]
)
def test_sublayers(runner, count, tokens):
    with engine_process(runner) as call:
        plain = call(plain_outcome, count, tokens)
        clasp, masks, costs = call(clasp_outcome, CLASP, count, tokens)
    assert clasp.token_ids == plain.token_ids
    assert clasp.num_accepted_tokens > clasp.num_drafts
    assert masks
    for mask in masks:  # found when the contexts were short, or longer
        assert 12 * UNITS in (cost_of(mask, (1, 3) * 24), cost_of(mask, costs))
    assert any(mask[::2] != mask[1::2] for mask in masks)


def test_the_controller_over_sublayers():
    config = {key: CLASP[key] for key in ("method", "granularity", "num_speculative_tokens")}
    with engine_process("v1") as call:
        plain = call(plain_outcome, 8, 32)
        clasp, masks, costs = call(clasp_outcome, config | {"ngram_cascade": False}, 8, 32)
    assert clasp.token_ids == plain.token_ids
    assert clasp.num_accepted_tokens > 0
    assert masks
    for mask in masks:  # of the largest budget
        assert 16 * UNITS in (cost_of(mask, (1, 3) * 24), cost_of(mask, costs))


def long_contexts(config: dict | None) -> tuple[list, list[tuple[int, ...]]]:
    """Short prompts, then some that begin alike with a long text, and short ones again."""
    with running(speculative_config=config, max_num_seqs=4, max_model_len=1024) as llm:
        token_ids, costs = [], []
        for prompts in (PROMPTS[:2], [LONG + prompt for prompt in PROMPTS[:4]], PROMPTS[4:6]):
            token_ids.append(generate(llm, prompts, max_tokens=64).token_ids)
            if config is not None:
                costs.append(drafter(llm).policy._items.costs)
        return token_ids, costs


@pytest.mark.slow
def test_attention_costs_more_in_long_contexts():
    with engine_process("v1") as call:
        plain, _ = call(long_contexts, None)
        clasp, costs = call(long_contexts, CLASP | {"optimization_interval": 1})
    assert clasp == plain
    assert costs == [(1, 3) * 24, (2, 2) * 24, (1, 3) * 24]
