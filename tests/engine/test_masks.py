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


def forced_drafts(together: bool) -> tuple[list[list[int]], list[list[tuple]]]:
    """Outputs and drafts (position, tokens) of six requests, each with a mask of its own."""
    import torch

    from clasp_vllm.skipping.mask import layers_mask

    masks = [
        layers_mask(24, random.Random(i).sample(range(24), count))
        for i, count in enumerate([0, 4, 8, 12, 12, 16])
    ]
    masks[1][7] = torch.tensor([True, False])  # a single sub-layer skipped
    masks[2][11] = torch.tensor([False, True])
    with running(speculative_config=SETTINGS) as llm:
        ours = drafter(llm)
        drafts: dict[int, list[tuple]] = {i: [] for i in range(len(masks))}
        original = ours.draft

        def draft(batch, num_tokens, sample):
            names = [int(r.split("-")[0]) % len(masks) for r in batch.request_ids]
            ours.sequences.slots(batch.request_ids)
            ours.sequences.set_masks(batch.request_ids, torch.stack([masks[n] for n in names])[:, None])
            found = original(batch, num_tokens, sample)
            for row, name in enumerate(names):
                drafts[name].append((int(batch.positions[row]), tuple(found.tokens[row].tolist())))
            return found

        ours.draft = draft
        prompts = PROMPTS[1 : 1 + 2 * len(masks) : 2]
        if together:
            outputs = generate(llm, prompts, max_tokens=24).token_ids
        else:
            outputs = [generate(llm, [prompt], max_tokens=24).token_ids[0] for prompt in prompts]
    return outputs, [drafts[i] for i in range(len(masks))]


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_each_row_drafts_as_alone(runner):
    with engine_process(runner) as call:
        outputs, drafts = call(forced_drafts, True)
        alone_outputs, alone_drafts = call(forced_drafts, False)
    assert outputs == alone_outputs
    for got, expected in zip(drafts, alone_drafts, strict=True):
        assert len(expected) >= 5
        # A request that ends stays in the batch for the last round or not: compare the common ones.
        assert [d for d in got if d[0] <= expected[-1][0]] == expected
    assert len({tuple(d[1] for d in rounds) for rounds in drafts}) == len(drafts)
