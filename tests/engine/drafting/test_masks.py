"""Rows with different masks in one batch get the drafts they would get alone."""

import random

import pytest
from engines import PROMPTS, drafter, engine_process, generate, running

SETTINGS = {
    "method": "layer_skip",
    "skip_layers": [],
    "num_speculative_tokens": 4,
    "draft_exit_threshold": 0.0,
}


Drafts = list[list[tuple]]  # position and tokens, by request


def forced_drafts() -> list[tuple[list[list[int]], Drafts]]:
    """Outputs and drafts of six requests, each with a mask of its own: all together, and one by one."""
    import torch

    from clasp_vllm.skipping.skip_mask import layers_mask

    masks = [
        layers_mask(24, random.Random(i).sample(range(24), count))
        for i, count in enumerate([0, 4, 8, 12, 12, 16])
    ]
    masks[1][7] = torch.tensor([True, False])  # a single sub-layer skipped
    masks[2][11] = torch.tensor([False, True])
    with running(speculative_config=SETTINGS) as llm:
        ours = drafter(llm)
        drafts: Drafts = []
        original = ours.draft

        def draft(batch, num_tokens, sample):
            names = [int(r.split("-")[0]) % len(masks) for r in batch.request_ids]
            ours.sequences.slots(batch.request_ids)
            ours.sequences.set_masks(batch.request_ids, torch.stack([masks[n] for n in names])[:, None])
            drafted = original(batch, num_tokens, sample)
            for row, name in enumerate(names):
                drafts[name].append((int(batch.positions[row]), tuple(drafted.tokens[row].tolist())))
            return drafted

        ours.draft = draft
        prompts = PROMPTS[1 : 1 + 2 * len(masks) : 2]
        runs = []
        for asked in [prompts], [[prompt] for prompt in prompts]:
            drafts = [[] for _ in masks]
            outputs = [ids for some in asked for ids in generate(llm, some, max_tokens=24).token_ids]
            runs.append((outputs, drafts))
    return runs


@pytest.mark.parametrize("runner", ["v1", pytest.param("v2", marks=pytest.mark.slow)])
def test_each_row_drafts_as_alone(runner):
    with engine_process(runner) as call:
        (outputs, drafts), (alone_outputs, alone_drafts) = call(forced_drafts)
    assert outputs == alone_outputs
    for got, expected in zip(drafts, alone_drafts, strict=True):
        assert len(expected) >= 5
        # A request that ends stays in the batch for the last round or not, and drafts at an answer's end are
        # as long as the longest of the batch: compare what is common.
        common = [d for d in got if d[0] <= expected[-1][0]]
        assert [position for position, _ in common] == [position for position, _ in expected]
        for (_, tokens), (_, alone) in zip(common, expected, strict=True):
            assert tokens[: len(alone)] == alone[: len(tokens)]
    assert len({tuple(d[1] for d in rounds) for rounds in drafts}) == len(drafts)
