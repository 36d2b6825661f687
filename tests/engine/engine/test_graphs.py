"""Draft steps by graphs are those by eager calls. A tape stands for CUDA graphs: see tests/tape.py."""

from __future__ import annotations

import copy
import random
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
from engines import PROMPTS, drafter, engine_process, generate, model_runner, running
from tape import TapeError

FIXED = {
    "method": "layer_skip",
    "skip_layers": [],
    "adaptive": False,
    "num_speculative_tokens": 4,
    "draft_exit_threshold": 0.0,
}
CLASP = {"method": "clasp", "adaptive": False, "num_speculative_tokens": 4, "optimization_interval": 4}


class InContext:
    """Replays in the forward context of the recording, which vLLM's attention asks for on every device.

    It holds nothing of that, so that what is gone after the capture is missed. Attention on a CPU makes
    metadata whose size follows the lengths. A graph cannot, so this, and this alone, is taken from ``fresh``.
    """

    def __init__(self, tape, fresh):
        from vllm.forward_context import get_forward_context, is_forward_context_available

        self._tape, self._fresh, self._context = tape, fresh, None
        if is_forward_context_available():
            context = get_forward_context()
            self._context = copy.copy(context)
            self._weak = [
                weakref.ref(x) for x in (*context.attn_metadata.values(), *context.slot_mapping.values())
            ]
            self._context.attn_metadata = self._context.slot_mapping = None

    def replay(self):
        from vllm.forward_context import override_forward_context

        if self._context is None:
            return self._tape.replay()
        if None in [reference() for reference in self._weak]:
            raise TapeError("attention metadata is gone after the capture")
        context = copy.copy(self._context)
        context.attn_metadata, slots = self._fresh[0]
        context.slot_mapping = dict.fromkeys(context.attn_metadata, slots)
        with override_forward_context(context):
            return self._tape.replay()


def graphs_of(llm):
    """Graphs of the engine's draft steps, on tapes."""
    import torch
    from tape import poison, recorded
    from vllm.config.compilation import CUDAGraphMode

    import clasp_vllm.engine.graphs as module

    runner = model_runner(llm)
    ours = drafter(llm)

    class Taped(module.DraftGraphs):
        def _make_buffers(self, rows):
            self.buffers = super()._make_buffers(rows)
            return self.buffers

        def _record(self, segment, work):
            device = [x for x in vars(self.buffers).values() if isinstance(x, torch.Tensor)]
            self.num_graphs += 1
            if segment == "begin":
                self.fresh = [None]
            buffers, fresh, tape = self.buffers, self.fresh, recorded(work, device)
            if segment == "begin":
                lengths = torch.full(
                    (len(buffers.tokens),), ours.passes.attention.max_model_len, dtype=torch.int32
                )

                def metadata():
                    inputs = buffers.cache_positions, buffers.block_table, lengths
                    with ours.passes.attention.decode(*inputs) as fresh[0]:
                        tape.replay()

                poison(device)
                return SimpleNamespace(replay=metadata)
            poison(device)
            return InContext(tape, fresh)

    module.graph_capture = lambda device: nullcontext()
    module.is_global_first_rank = lambda: False
    graphs = Taped(
        runner.vllm_config,
        runner.device,
        CUDAGraphMode.NONE,
        ours.passes.draft_decoder,
        ours.passes,
        ours.passes.attention,
        runner.kv_cache_config.num_blocks,
    )
    graphs.capture_drafts()
    return graphs


@contextmanager
def with_graphs(llm, counted):
    graphs = graphs_of(llm)
    draft = graphs.draft_step

    def counting(batch, plan):
        counted.append((len(batch.tokens), any(mixed for _, _, mixed in plan.steps)))
        return draft(batch, plan)

    graphs.draft_step = counting
    drafter(llm).passes._graphs = lambda: graphs
    yield graphs


def no_mismatch(break_it: bool) -> tuple[str | None, int, int]:
    """What the comparison at start-up says, and how many graphs there are and should be."""
    with running(speculative_config=FIXED, max_num_seqs=8) as llm:
        graphs = graphs_of(llm)
        if break_it:  # a graph that does nothing
            graphs._captured[4].run[11, 0].replay = lambda: None
            graphs._captured[4].keep[11, 0].replay = lambda: None
        sizes = [1, 2, 4, 8]
        parts = 2 * drafter(llm).decoder.num_layers
        return graphs.mismatch(), graphs.num_graphs, sum((1 + (s > 1)) * parts + 3 for s in sizes)


def forced_drafts(
    graphs: bool, context: str | int
) -> tuple[list[list[int]], list[list[tuple]], list[tuple[int, bool]]]:
    """Outputs and drafts of requests with masks of their own, and the steps that were replayed."""
    import torch

    from clasp_vllm.skipping.skip_mask import layers_mask

    chosen = [random.Random(i).sample(range(24), count) for i, count in enumerate([0, 4, 8, 12, 16])]
    masks = [layers_mask(24, some) for some in chosen]
    masks[1][7] = torch.tensor([True, False])
    masks[2][11] = torch.tensor([False, True])
    replayed: list[tuple[int, bool]] = []
    config = FIXED | {"draft_context": context}
    prompts = [prompt * 3 for prompt in PROMPTS]  # of more than the two blocks that a short context has
    # vLLM aligns the width of a block table to 128 tokens.
    with running(speculative_config=config, max_num_seqs=8, block_size=32, max_model_len=300) as llm:
        ours = drafter(llm)
        drafts: list[list[tuple]] = [[] for _ in masks]
        original = ours.draft

        def draft(batch, num_tokens, sample):
            names = [int(r.split("-")[0]) % len(masks) for r in batch.request_ids]
            ours.sequences.slots(batch.request_ids)
            ours.sequences.set_masks(batch.request_ids, torch.stack([masks[n] for n in names])[:, None])
            made = original(batch, num_tokens, sample)
            for row, name in enumerate(names):
                drafts[name].append((int(batch.positions[row]), tuple(made.tokens[row].tolist())))
            return made

        ours.draft = draft
        with with_graphs(llm, replayed) if graphs else nullcontext():
            # Rows end at different times, so that sizes with unused rows are used again.
            outputs = [
                *generate(llm, prompts[1:6], max_tokens=24).token_ids,
                *generate(llm, prompts[6:7], max_tokens=30).token_ids,
                *generate(llm, prompts[7:10], max_tokens=12).token_ids,
            ]
    return outputs, drafts, replayed


def outputs(config: dict | None, graphs: bool) -> tuple[list[list[int]], int, int, bool]:
    """Greedy tokens, the steps that were replayed, failures, and whether the gauge says how many graphs."""
    replayed: list[tuple[int, bool]] = []
    with running(speculative_config=config, max_num_seqs=8) as llm:
        with with_graphs(llm, replayed) if graphs else nullcontext() as used:
            tokens = generate(llm, PROMPTS[:8], max_tokens=24).token_ids
        failures = 0 if config is None else drafter(llm).statistics.total.failures
        gauge = [m.value for m in llm.get_metrics() if m.name == "vllm:layer_skip_cuda_graphs"]
        counted = gauge == [] if used is None else gauge == [used.num_graphs] and used.num_graphs > 0
    return tokens, len(replayed), failures, counted


RUNNERS = pytest.mark.parametrize("runner", ["v1", pytest.param("v2", marks=pytest.mark.slow)])


@RUNNERS
def test_the_comparison_at_start_up_finds_what_is_wrong(runner):
    with engine_process(runner) as call:
        mismatch, graphs, expected = call(no_mismatch, False)
        assert mismatch is None
        assert graphs == expected
        mismatch, _, _ = call(no_mismatch, True)
    assert "4 rows are off" in mismatch


@RUNNERS
@pytest.mark.parametrize("context", ["full", 1])
def test_drafts_are_those_of_eager_calls(runner, context):
    with engine_process(runner) as call:
        eager = call(forced_drafts, False, context)
        graphs = call(forced_drafts, True, context)
    assert graphs[:2] == eager[:2]
    assert {rows for rows, _ in graphs[2]} >= {1, 3, 5}
    assert {mixed for _, mixed in graphs[2]} == {False, True}


@RUNNERS
def test_output_is_plain_vllms(runner):
    with engine_process(runner) as call:
        plain, _, _, _ = call(outputs, None, False)
        tokens, replayed, failures, counted = call(outputs, CLASP, True)
    assert tokens == plain
    assert counted
    assert replayed > 5
    assert failures == 0
