"""Drafts that attend to a sink and a window: which tokens they see, and what they compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_target import BLOCK, Target
from hypothesis import given
from hypothesis import strategies as st

from clasp_vllm.control.planner import Choice
from clasp_vllm.drafting.context import CacheRows, cut_context, tokens_read
from clasp_vllm.drafting.draft import DrafterOptions
from clasp_vllm.drafting.drafter import Drafter
from clasp_vllm.drafting.passes import Model, Passes
from clasp_vllm.drafting.plans import Plan
from clasp_vllm.drafting.scratch import ScratchBlocks
from clasp_vllm.drafting.sequences import SequenceTable
from clasp_vllm.policies.clasp import Clasp
from clasp_vllm.skipping.reference import best_skip_set
from clasp_vllm.skipping.skip_mask import layers_mask

LAYERS, LENGTH, CPU = 6, 6, torch.device("cpu")
# At the border of a block, within one, and shorter than any window.
PROMPTS = [[(7 * i + row) % 32 for i in range(length)] for row, length in enumerate((24, 21, 22, 3))]
WINDOWS = [1, 4, 5, 8, 9]


def sees(position: int, window: int, block: int, sink: bool = True) -> set[int]:
    """The tokens that one at a position is to attend to."""
    last = position // block
    blocks = {0} if sink else set()
    blocks |= {b for b in range(last + 1) if b > last - (-(-(window - 1) // block) + 1)}
    return {token for token in range(position + 1) if token // block in blocks}


@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=5),
    st.integers(1, 250),
    st.sampled_from([4, 16]),
    st.integers(0, 9),
    st.booleans(),
)
def test_the_sink_and_the_last_blocks_are_left(positions, window, block, spare, sink):
    """In their order, with the row's own slot as before; and the window's tokens are there, whatever else."""
    width = max(positions) // block + 1 + spare
    table = torch.arange(len(positions) * width, dtype=torch.int32).view(-1, width) + 1
    at = torch.tensor(positions)
    whole = CacheRows(at, table, (at + 1).int())
    cut = cut_context(whole, window, block, 10_000, sink)
    assert cut.block_table.shape[1] <= width
    assert (cut.max_lengths > cut.positions).all()
    for row, position in enumerate(positions):
        kept = int(cut.positions[row])
        slots = [int(cut.block_table[row, t // block]) * block + t % block for t in range(kept + 1)]
        expected = sorted(sees(position, window, block, sink))
        assert slots == [int(table[row, t // block]) * block + t % block for t in expected]
        assert set(range(max(position + 1 - window, 0), position + 1)) <= set(expected)
        assert len(expected) <= tokens_read(window, block, sink)


def test_short_rows_and_no_window_are_left_as_they_are():
    rows = CacheRows(torch.tensor([11, 3]), torch.ones(2, 4, dtype=torch.int32), torch.tensor([12, 4]))
    assert cut_context(rows, None, 4, 64) is rows
    assert cut_context(rows, 8, 4, 64) is rows
    assert cut_context(rows, 4, 4, 64) is rows  # in three blocks
    assert cut_context(rows, 1, 4, 64) is not rows


def test_rows_past_the_end_write_nothing():
    """Which the engine's attention knows by their positions."""
    rows = CacheRows(torch.tensor([64]), torch.ones(1, 16, dtype=torch.int32), torch.tensor([64]))
    assert cut_context(rows, 4, 4, 64).positions.tolist() == [64]


@pytest.fixture
def target() -> Target:
    return Target(PROMPTS)


def passes_of(target: Target, columns: int = 4) -> Passes:
    scratch = ScratchBlocks(target.cache.scratch_block, len(PROMPTS), columns, BLOCK, CPU)
    return Passes(Model(target.decoder(), target.head), target.cache, scratch)


def everything(window: int | None) -> Plan:
    return Plan([(layer, part, False) for layer in range(LAYERS) for part in (0, 1)], None, window)


class Masked:
    """The attention of the target by one dense product and a mask, over the whole block tables."""

    def __init__(self, target: Target, window: int) -> None:
        self.cache, self.window = target.cache, window

    def __call__(self, layer, query, key, value):
        cache, results = self.cache, []
        positions, tables = cache.rows
        for position, table, *qkv in zip(positions.tolist(), tables, query, key, value, strict=True):
            cache.memory[layer, table[position // BLOCK], position % BLOCK] = torch.stack(qkv[1:])
            past = cache.memory[layer, table].flatten(0, 1)[: position + 1]
            hidden = [t not in sees(position, self.window, BLOCK) for t in range(position + 1)]
            scores = (past[:, 0] @ qkv[0] / len(qkv[0]) ** 0.5).masked_fill(torch.tensor(hidden), -torch.inf)
            results.append(scores.softmax(0) @ past[:, 1])
        return torch.stack(results)


@pytest.mark.parametrize("window", WINDOWS)
@torch.inference_mode()
def test_a_draft_step_is_dense_attention_with_a_mask(target, window, monkeypatch):
    passes, batch = passes_of(target), target.batch()
    cut = passes.draft_step(batch, everything(window))
    keys = target.cache.memory.clone()
    monkeypatch.setattr(target.cache, "attend", Masked(target, window))
    torch.testing.assert_close(cut, passes.draft_step(batch, everything(None)))
    torch.testing.assert_close(keys, target.cache.memory, equal_nan=True)
    monkeypatch.undo()
    whole = passes.draft_step(batch, everything(None))
    assert not torch.allclose(cut[:3], whole[:3])
    torch.testing.assert_close(cut[3], whole[3])


def drafter_of(target: Target, window: int | None, policy=None) -> Drafter:
    passes = passes_of(target)
    sequences = SequenceTable(8, torch.stack([layers_mask(LAYERS, range(1, 1 + n)) for n in (0, 1, 2, 3)]))
    options = DrafterOptions((0,), (window,), 2, 0.0)
    made = Clasp(sequences, passes, (0, 1, 2, 3), 4, (window,)) if policy is None else policy
    return Drafter(passes._target.decoder, passes, sequences, made, options)


def greedy(target: Target):
    return lambda hidden, positions, step, rows, exact=None: (target.head(hidden).argmax(-1), None)


@pytest.mark.parametrize("window", WINDOWS)
@torch.inference_mode()
def test_drafts_cross_block_borders(target, window, monkeypatch):
    """And write nothing but their own slots, whose keys stay those that the next steps read."""
    from clasp_vllm.drafting.policy import Policy

    drafter, batch = drafter_of(target, window, Policy()), target.batch()
    before = target.cache.memory.clone()
    tokens = drafter.draft(batch, LENGTH, greedy(target)).tokens
    changed = before.nan_to_num(7.0) != target.cache.memory.nan_to_num(7.0)
    written = {(block, slot) for _, block, slot in changed.flatten(3).any(3).nonzero().tolist()}
    assert written <= {
        (int(table[p // BLOCK]), p % BLOCK)
        for first, table in zip(batch.positions.tolist(), target.tables, strict=True)
        for p in range(first, first + LENGTH)
    }
    monkeypatch.setattr(target.cache, "attend", Masked(target, window))
    assert tokens.tolist() == [target.continuation(row, LENGTH) for row in range(len(PROMPTS))]


@pytest.mark.parametrize("window", [4, 9])
@torch.inference_mode()
def test_the_programme_judges_drafts_with_a_window_by_the_whole_context(target, window, monkeypatch):
    batch, passes, budget = target.batch(), passes_of(target), 3
    before = target.cache.memory.clone()
    programme, hidden = passes.programme(batch, budget, None, 0.0, None, window)
    changed = (before.nan_to_num(7.0) != target.cache.memory.nan_to_num(7.0)).flatten(2).any(2)
    own = {int(table[p // BLOCK]) for p, table in zip(batch.positions, target.tables, strict=True)}
    blocks = set(changed.any(0).nonzero().flatten().tolist())
    assert blocks <= own | set(range(target.cache.scratch_block, target.cache.memory.shape[1]))
    unskipped = passes.draft_step(batch, everything(window))
    for row, (prompt, skipped) in enumerate(zip(PROMPTS, programme.mask(budget), strict=True)):
        logits = target.run(row, prompt[-1], len(prompt) - 1)
        torch.testing.assert_close(target.head(hidden[row]), logits)
        states = target_states(target, row)

        def layer(index: int, row: int = row):
            def run(x: torch.Tensor) -> torch.Tensor:
                rows = np.array([row])
                with target.cache.decode(*passes.cache_rows(batch.select(rows), window)):
                    positions = batch.positions[row : row + 1]
                    return sum(
                        passes._target.decoder.run_layer(index, positions, (x[None], torch.zeros(1, 16)))
                    )[0]

            return run

        embedded = target.model.embed(batch.tokens[row])
        expected, state = best_skip_set(embedded, [layer(i) for i in range(LAYERS)], budget, None, states)
        assert frozenset(skipped.nonzero().flatten().tolist()) == expected
        torch.testing.assert_close(sum(programme.states)[budget, row], state)
    # Column 0 skips nothing, and is a draft all the same.
    torch.testing.assert_close(
        passes._target.decoder.finish(tuple(x[0] for x in programme.states)), unskipped
    )


def target_states(target: Target, row: int) -> list[torch.Tensor]:
    """The target's states after each layer, over the whole context."""
    rows = np.array([row])
    batch, decoder, states = target.batch().select(rows), target.decoder(), []
    with target.cache.decode(batch.positions, batch.block_table, batch.max_lengths):
        state = decoder.embed(batch.tokens)
        for layer in range(LAYERS):
            state = decoder.run_layer(layer, batch.positions, state)
            states.append(sum(state)[0])
    return states


@torch.inference_mode()
def test_the_first_token_of_an_optimising_round_is_the_targets(target):
    right = [target.continuation(row, 1)[0] for row in range(len(PROMPTS))]
    output = drafter_of(target, 1).draft(target.batch(), LENGTH, greedy(target))
    assert output.tokens[:, 0].tolist() == right


@torch.inference_mode()
def test_a_round_drafts_with_the_context_of_its_choice(target, monkeypatch):
    drafter = drafter_of(target, None)
    drafter.options = DrafterOptions((0,), (None, 9, 4), 2, 0.0)
    seen: list[int | None] = []
    step = drafter.passes.draft_step
    monkeypatch.setattr(
        drafter.passes, "draft_step", lambda b, plan: (seen.append(plan.window), step(b, plan))[1]
    )
    drafter.policy._contexts = (None, 9, 4)
    for context in (0, 2):
        choice = Choice(0, 2, context=context)
        monkeypatch.setattr("clasp_vllm.drafting.drafter.Choice", lambda *_, choice=choice: choice)
        drafter.draft(target.batch(), 2, greedy(target))
    assert seen == [None, 4, 4]  # the first round optimises all, and so drafts one step
