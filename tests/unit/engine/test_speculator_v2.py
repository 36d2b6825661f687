"""Model Runner V2's speculator by itself: what the rejection sampler is told, and memory."""

from types import SimpleNamespace

import numpy as np
import pytest
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


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_share_something_when_the_model_is_loaded(monkeypatch, ranks):
    """NCCL allocates then, and vLLM counts what it takes before it sizes the KV cache."""
    import clasp_vllm.engine.build as build
    import clasp_vllm.engine.proposer_v1 as v1
    import clasp_vllm.engine.speculator_v2 as v2

    shared: list[torch.Tensor] = []

    def broadcast(tensor, src):
        shared.append(tensor)
        return tensor

    monkeypatch.setattr(build, "get_tp_group", lambda: SimpleNamespace(world_size=ranks, broadcast=broadcast))
    for module in (v1, v2):
        monkeypatch.setattr(module, "build_decoder", lambda model: None)
    device = torch.device("cpu")
    v1.LayerSkipProposer.load_model(SimpleNamespace(device=device), None)
    assert len(shared) == ranks - 1
    v2.LayerSkipSpeculator.load_draft_model(SimpleNamespace(device=device), None, set())
    assert len(shared) == 2 * (ranks - 1)
