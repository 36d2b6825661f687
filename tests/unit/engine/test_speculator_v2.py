"""Model Runner V2's speculator by itself: what the rejection sampler is told, graphs that fail, memory."""

import logging
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


@pytest.mark.parametrize("drawn", [True, False])
def test_drafts_of_requests_with_a_grammar_are_not_drawn(drawn):
    """What the grammar forbids of a drawn draft would bias the token that takes its place."""
    from clasp_vllm.engine.speculator_v2 import LayerSkipSpeculator

    ours = SimpleNamespace(
        structured=np.array([False, True, False, True]),
        temperature=torch.ones(4),
        draft_logits=torch.zeros(4, 2, 5) if drawn else None,
        device=torch.device("cpu"),
    )
    greedily = LayerSkipSpeculator._draft_greedily(ours, np.array([3, 0]))
    assert greedily.tolist() == [True, False]
    assert ours.temperature.tolist() == ([1.0, 1.0, 1.0, 0.0] if drawn else [1.0] * 4)


def captured(monkeypatch, graphs, ranks: int = 1) -> tuple[object, list[str]]:
    """The speculator's graphs after it has captured these, and the log."""
    import clasp_vllm.engine.build as build
    import clasp_vllm.engine.speculator_v2 as module

    group = SimpleNamespace(world_size=ranks)
    monkeypatch.setattr(module, "get_tp_group", lambda: group)
    monkeypatch.setattr(build, "get_tp_group", lambda: group)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    module.logger.addHandler(handler)
    try:
        ours = SimpleNamespace(graphs=graphs)
        module.LayerSkipSpeculator.capture(ours)
    finally:
        module.logger.removeHandler(handler)
    return ours.graphs, messages


def failing(error: Exception | None = None, mismatch: str | None = None) -> SimpleNamespace:
    """Graphs whose capture raises, or that compute something else than eager calls."""

    def capture_drafts():
        if error is not None:
            raise error

    return SimpleNamespace(capture_drafts=capture_drafts, mismatch=lambda: mismatch)


def test_graphs_that_fail_are_done_without(monkeypatch):
    from clasp_vllm.engine.graphs import CaptureError

    good = failing()
    assert captured(monkeypatch, good) == (good, [])
    graphs, messages = captured(monkeypatch, failing(CaptureError("capturing (head) failed")))
    assert graphs is None
    assert "without CUDA graphs: capturing (head) failed" in messages[0]
    graphs, messages = captured(monkeypatch, failing(mismatch="the states of 2 rows are off"))
    assert graphs is None
    assert "without CUDA graphs: the states of 2 rows are off" in messages[0]


def test_graphs_are_of_the_layers_that_draft(monkeypatch):
    """Which have weights of their own, where ``draft_weights`` says so."""
    from vllm.config.compilation import CUDAGraphMode

    import clasp_vllm.engine.speculator_v2 as module

    monkeypatch.setattr(module, "DraftGraphs", lambda *arguments: arguments)
    backend = SimpleNamespace(get_name=lambda: "FLASH_ATTN")
    passes = SimpleNamespace(draft_decoder="the draft's")
    ours = SimpleNamespace(
        device=torch.device("cuda"),
        attn_groups=[[SimpleNamespace(backend=backend)]],
        drafter=SimpleNamespace(passes=passes),
        decoder="the target's",
        vllm_config=None,
        _attention=None,
        _num_blocks=8,
    )
    module.LayerSkipSpeculator.init_cudagraph_manager(ours, CUDAGraphMode.FULL_AND_PIECEWISE)
    assert ours.graphs[3:5] == ("the draft's", passes)
    module.LayerSkipSpeculator.init_cudagraph_manager(ours, CUDAGraphMode.PIECEWISE)
    assert ours.graphs is None


def test_what_fails_without_graphs_too_ends_the_start(monkeypatch):
    """And with several ranks all that fails, for the others would wait."""
    from clasp_vllm.engine.graphs import CaptureError

    with pytest.raises(ZeroDivisionError):
        captured(monkeypatch, failing(ZeroDivisionError()))
    with pytest.raises(CaptureError):
        captured(monkeypatch, failing(CaptureError()), ranks=2)


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
    model = torch.nn.Linear(1, 1)
    v1.LayerSkipProposer.load_model(SimpleNamespace(device=device), model)
    assert len(shared) == ranks - 1
    v2.LayerSkipSpeculator.load_draft_model(SimpleNamespace(device=device), model, set())
    assert len(shared) == 2 * (ranks - 1)


def test_our_attention_works_in_the_runners_buffer():
    from clasp_vllm.engine.attention import TargetAttention

    class Builder:
        """Of FlashInfer, as far as its workspace goes."""

        def __init__(self, workspace):
            self.workspace = workspace

        def _get_workspace_buffer(self):
            return self.workspace

        def set_workspace_buffer(self, workspace):
            self.workspace = workspace

    def groups(builder):
        return [[SimpleNamespace(metadata_builders=[builder])]]

    ours, theirs = Builder("ours"), Builder("theirs")
    TargetAttention.share_workspace(SimpleNamespace(attn_groups=groups(ours)), groups(theirs))
    assert ours.workspace == "theirs"
    other = object()  # most backends have none
    TargetAttention.share_workspace(SimpleNamespace(attn_groups=groups(other)), groups(other))
