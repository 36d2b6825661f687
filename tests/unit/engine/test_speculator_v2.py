"""What Model Runner V2's rejection sampler is told of drafts."""

from types import SimpleNamespace

import numpy as np
import torch


def test_tokens_that_were_not_drawn_are_certain():
    """Looked up, or filling up a draft: all draft probability is on them; others keep theirs."""
    from clasp_vllm.engine.speculator_v2 import LayerSkipSpeculator

    stored = torch.randn(6, 3, 5)  # [slots, steps, vocab]
    ours = SimpleNamespace(draft_logits=stored.clone(), device=torch.device("cpu"))
    slots, certain = torch.tensor([4, 1]), np.array([[True, True, True], [False, False, True]])
    tokens = torch.tensor([[0, 2, 4], [1, 1, 3]])
    LayerSkipSpeculator._mark_certain(ours, slots, certain, tokens)
    draft_probs = ours.draft_logits.softmax(-1)
    for row, slot in enumerate(slots.tolist()):
        for step in range(3):
            if certain[row, step]:
                assert draft_probs[slot, step, tokens[row, step]] == 1.0
                assert draft_probs[slot, step].sum() == 1.0
                stored[slot, step] = ours.draft_logits[slot, step]
    assert (ours.draft_logits == stored).all()
