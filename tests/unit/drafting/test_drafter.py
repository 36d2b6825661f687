"""Decoder, passes, plans and drafter on a target in pure torch."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_target import BLOCK, Layer, Target
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from clasp_vllm.control.controller import Controller
from clasp_vllm.control.costs import LayerShares, PassCosts
from clasp_vllm.control.planner import Choice
from clasp_vllm.device import rows_index
from clasp_vllm.drafting.decoder import Decoder, UnsupportedArchitectureError
from clasp_vllm.drafting.draft import DrafterOptions
from clasp_vllm.drafting.drafter import Drafter
from clasp_vllm.drafting.passes import CHUNK, Model, Passes, top_probability
from clasp_vllm.drafting.plans import Plan, Plans
from clasp_vllm.drafting.policy import Policy
from clasp_vllm.drafting.scratch import ScratchBlocks
from clasp_vllm.drafting.sequences import SequenceTable
from clasp_vllm.policies.clasp import Clasp
from clasp_vllm.policies.evidence import SkipEvidence
from clasp_vllm.skipping.reference import best_skip_set
from clasp_vllm.skipping.skip_mask import layers_mask

LAYERS, LENGTH = 6, 4
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9]]
CPU = torch.device("cpu")
# Prompts end within a block and at the border of one.
assert {len(prompt) % BLOCK for prompt in PROMPTS} == {0, 1, 2}


@pytest.fixture
def target() -> Target:
    return Target(PROMPTS)


def passes_of(target: Target, columns: int = 3, draft: Model | None = None) -> Passes:
    scratch = ScratchBlocks(target.cache.scratch_block, len(PROMPTS), columns, BLOCK, CPU)
    return Passes(Model(target.decoder(), target.head), target.cache, scratch, draft=draft)


def masks_of(*skipped: list[int]) -> torch.Tensor:
    """[rows, 1, num_layers, 2]."""
    return torch.stack([layers_mask(LAYERS, layers) for layers in skipped])[:, None]


def drafter_of(target: Target, budgets=(3,), policy=None, **options) -> Drafter:
    passes = passes_of(target)
    sequences = SequenceTable(8, torch.stack([layers_mask(LAYERS, range(1, 1 + n)) for n in budgets]))
    made = Policy() if policy is None else policy(sequences, passes)
    return Drafter(
        passes._target.decoder, passes, sequences, made, DrafterOptions(budgets, (None,), 2, 0.0), **options
    )


def greedy(target: Target):
    return lambda hidden, positions, step, rows, exact=None: (target.head(hidden).argmax(-1), None)


# The decoder.


def test_all_sublayers_are_the_model(target):
    decoder, batch = target.decoder(), target.batch()
    with torch.inference_mode(), target.cache.decode(batch.positions, batch.block_table, batch.max_lengths):
        state = decoder.embed(batch.tokens)
        for layer in range(LAYERS):
            state = decoder.run_layer(layer, batch.positions, state)
        hidden = decoder.finish(state)
        assert torch.equal(hidden, target.model(batch.tokens, batch.positions))


class Parallel(Layer):
    """Attention and MLP side by side."""

    def forward(self, positions, hidden_states, residual):
        normed, residual = self.input_layernorm(hidden_states, residual)
        attention = self.self_attn(positions=positions, hidden_states=normed)
        return attention + self.mlp(normed), residual


def test_layers_of_another_form_are_refused(target):
    target.model.layers[3] = Parallel(3, 16, target.cache)
    with pytest.raises(UnsupportedArchitectureError, match="Parallel"):
        target.decoder()
    with pytest.raises(UnsupportedArchitectureError, match="it has no model"):
        Decoder(nn.Module(), [Layer], [], "the fake")


# Plans and passes.


def test_a_plan_leaves_out_what_all_skip_and_says_what_some_skip(target):
    sequences = SequenceTable(4, masks_of([0])[0])
    slots = sequences.slots(["a", "b"])
    plans, choice = Plans(sequences, (None,), CPU), Choice(0, 4)
    sequences.set_masks(["a", "b"], masks_of([1, 2], [2, 3]))
    plan = plans.plan(slots, choice)
    assert {layer for layer, _, _ in plan.steps} == {0, 1, 3, 4, 5}
    assert {layer for layer, _, mixed in plan.steps if mixed} == {1, 3}
    assert plans.plan(slots, choice) is plan
    assert plans.plan(slots[:1], choice).masks is None  # alone it runs what it keeps
    sequences.set_masks(["a"], masks_of([2, 3]))
    assert plans.plan(slots, choice).masks is None


@torch.inference_mode()
def test_rows_with_different_masks_get_what_they_would_get_alone(target):
    batch, passes = target.batch(), passes_of(target)
    sequences = SequenceTable(4, masks_of([0])[0])
    slots = sequences.slots(batch.request_ids)
    sequences.set_masks(batch.request_ids, masks_of([1, 2], [2, 5], []))
    plans, choice = Plans(sequences, (None,), CPU), Choice(0, 4)
    together = passes.draft_step(batch, plans.plan(slots, choice))
    for row in range(len(PROMPTS)):
        rows = np.array([row])
        alone = passes.draft_step(batch.select(rows), plans.plan(slots[rows], choice))
        torch.testing.assert_close(together[row : row + 1], alone)


@torch.inference_mode()
def test_columns_with_weights_of_their_own(target):
    """The target supplies what they are compared with, and only scratch and its own slot are written."""
    draft, budget = target.rounded(0.1), 3
    batch, passes = target.batch(), passes_of(target, budget + 1, draft)
    before = target.cache.memory.clone()
    programme, hidden = passes.programme(batch, budget, None, 0.0, None)
    changed = (before.nan_to_num(7.0) != target.cache.memory.nan_to_num(7.0)).flatten(3).any(3)
    scratch = set(range(target.cache.scratch_block, target.cache.memory.shape[1]))
    slots = {
        (int(table[p // BLOCK]), int(p % BLOCK))
        for p, table in zip(batch.positions, target.tables, strict=True)
    }
    written = {(block, slot) for _, block, slot in changed.nonzero().tolist() if block not in scratch}
    assert written <= slots
    after = target.cache.memory.clone()
    for row, prompt in enumerate(PROMPTS):
        logits = target.run(row, prompt[-1], len(prompt) - 1)
        torch.testing.assert_close(target.head(hidden[row]), logits)
    # What the pass left in the requests' own blocks is the target's own keys and values.
    blocks = [block for block, _ in slots]
    torch.testing.assert_close(after[:, blocks], target.cache.memory[:, blocks], equal_nan=True)
    # Column 0 skips nothing, but is a draft: near the target, and not equal.
    unskipped = draft.decoder.finish(tuple(x[0] for x in programme.states))
    similarity = torch.nn.functional.cosine_similarity(unskipped, hidden)
    assert (similarity > 0.9).all()
    assert not torch.allclose(unskipped, hidden)
    every = Plan([(layer, part, False) for layer in range(LAYERS) for part in (0, 1)])
    torch.testing.assert_close(passes.draft_step(batch, every), unskipped)


@torch.inference_mode()
def test_states_of_the_target_go_through_its_head(target):
    draft = target.rounded(0.2)
    passes, hidden = passes_of(target, draft=draft), torch.randn(4, 16)
    torch.testing.assert_close(passes.logits(hidden), draft.logits(hidden))
    every = passes.logits(hidden, np.arange(4))
    torch.testing.assert_close(every, target.head(hidden))
    some = passes.logits(hidden, np.array([1, 3]))
    torch.testing.assert_close(some[[1, 3]], every[[1, 3]])
    torch.testing.assert_close(some[[0, 2]], draft.logits(hidden)[[0, 2]])


@torch.inference_mode()
def test_the_first_token_of_an_optimising_round_is_the_targets(target):
    """Though the draft's weights are so coarse that it is wrong otherwise."""
    passes = passes_of(target, 4, target.rounded(1.0))
    sequences = SequenceTable(8, torch.stack([layers_mask(LAYERS, range(1, 1 + n)) for n in (0, 1, 2, 3)]))
    policy = Clasp(sequences, passes, (0, 1, 2, 3), 2)
    options = DrafterOptions((0, 1, 2, 3), (None,), 2, 0.0)
    drafter = Drafter(passes._target.decoder, passes, sequences, policy, options)
    asked: list[np.ndarray | None] = []

    def sample(hidden, positions, step, rows, exact=None):
        asked.append(exact)
        return passes.logits(hidden, exact).argmax(-1), None

    right = [target.continuation(row, 1)[0] for row in range(len(PROMPTS))]
    output = drafter.draft(target.batch(), 2, sample)
    assert output is not None
    due = asked[0]
    assert due is not None
    assert len(due) == 2
    assert asked[1] is None
    assert [int(output.tokens[row, 0]) for row in due] == [right[row] for row in due]


@torch.inference_mode()
def test_columns_are_the_programme_of_each_request(target):
    """With its exact past; and nothing but scratch and the token's own slot is written."""
    batch, passes, budget = target.batch(), passes_of(target), 3
    before = target.cache.memory.clone()
    programme, hidden = passes.programme(batch, budget, None, 0.0, None)
    changed = (before.nan_to_num(7.0) != target.cache.memory.nan_to_num(7.0)).flatten(2).any(2)
    own = {int(table[p // BLOCK]) for p, table in zip(batch.positions, target.tables, strict=True)}
    blocks = set(changed.any(0).nonzero().flatten().tolist())
    assert blocks <= own | set(range(target.cache.scratch_block, target.cache.memory.shape[1]))
    for row, (prompt, skipped) in enumerate(zip(PROMPTS, programme.mask(budget), strict=True)):
        logits = target.run(row, prompt[-1], len(prompt) - 1)
        torch.testing.assert_close(target.head(hidden[row]), logits)
        positions = batch.positions[row : row + 1]

        def layer(index: int, row: int = row, positions: torch.Tensor = positions):
            def run(x: torch.Tensor) -> torch.Tensor:
                with target.cache.decode(positions, target.tables[row : row + 1], positions + 1):
                    state = (x[None], torch.zeros(1, 16))
                    return sum(passes._target.decoder.run_layer(index, positions, state))[0]

            return run

        embedded = target.model.embed(batch.tokens[row])
        expected, state = best_skip_set(embedded, [layer(i) for i in range(LAYERS)], budget)
        assert frozenset(skipped.nonzero().flatten().tolist()) == expected
        torch.testing.assert_close(sum(programme.states)[budget, row], state)
        # The request's own block holds the target's key and value again.
        target.run(row, prompt[-1], len(prompt) - 1)


# The drafter.


@torch.inference_mode()
def test_a_draft_that_skips_nothing_is_the_target(target):
    expected = [target.continuation(row, LENGTH) for row in range(len(PROMPTS))]
    drafter = drafter_of(target, budgets=(0,))
    output = drafter.draft(target.batch(), LENGTH, greedy(target))
    assert output.tokens.tolist() == expected
    assert output.lengths.tolist() == [LENGTH] * len(PROMPTS)
    assert drafter.statistics.total.sublayers == LENGTH * LAYERS * 2


def clasp(sequences, passes) -> Clasp:
    evidence = SkipEvidence(8, LAYERS, 4, 0.9, CPU)
    return Clasp(sequences, passes, (3,), max_requests=2, evidence=evidence)


def test_budgets_are_chosen_from_one_pass(target):
    """Masks for all of them, whose states the controller hears of."""

    def several(sequences, passes) -> Clasp:
        evidence = SkipEvidence(8, LAYERS, 4, 0.9, CPU)
        return Clasp(sequences, passes, (1, 2, 3), max_requests=2, evidence=evidence)

    heard: list[np.ndarray] = []
    drafter = drafter_of(target, budgets=(1, 2, 3), policy=several)
    drafter.policy.controller = SimpleNamespace(last=None, learn=lambda agree, *_: heard.append(agree))
    with torch.inference_mode():
        drafter.draft(target.batch(), LENGTH, greedy(target))
    assert [agree.shape for agree in heard] == [(2, 3)]
    assert drafter.sequences.masks[:2, :, :, 0].sum(2).tolist() == [[1, 2, 3]] * 2


@torch.inference_mode()
def test_the_first_token_of_optimised_requests_is_the_targets(target):
    first = [target.continuation(row, 1)[0] for row in range(len(PROMPTS))]
    drafter = drafter_of(target, policy=clasp)
    output = drafter.draft(target.batch(), LENGTH, greedy(target))
    optimised = drafter.sequences.has_own[drafter.sequences.slots(["0", "1", "2"])]
    assert optimised.tolist() == [True, True, False]  # two at once
    assert output.tokens[:2, 0].tolist() == first[:2]
    masks = drafter.sequences.masks[:3, 0, :, 0]
    assert (masks.sum(1) == 3).all()
    assert drafter.statistics.total.optimized == 2
    drafter.draft(target.batch(), LENGTH, greedy(target))
    assert drafter.sequences.has_own[:3].all()


@torch.inference_mode()
def test_a_failure_costs_a_draft_and_nothing_else(target):
    failures: list[Exception] = []
    drafter = drafter_of(target, on_failure=lambda error, before: failures.append(error))

    def broken(*_):
        raise ZeroDivisionError

    drafter.start(CPU)
    assert drafter.draft(target.batch(), LENGTH, broken) is None
    assert drafter.draft(target.batch(), LENGTH, greedy(target)) is not None
    assert len(failures) == drafter.statistics.total.failures == 1


@torch.inference_mode()
def test_a_failure_before_the_start_has_ended_ends_it(target):
    """In the engine's warm-up, and while passes are timed."""
    failures: list[Exception] = []
    drafter = drafter_of(
        target, on_failure=lambda error, before: failures.append(error), make_controller=lambda costs: None
    )

    def broken(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        drafter.draft(target.batch(), LENGTH, broken)
    drafter.passes.measure = broken
    with pytest.raises(ZeroDivisionError):
        drafter.start(CPU)
    with pytest.raises(ZeroDivisionError):  # it has not ended
        drafter.draft(target.batch(), LENGTH, broken)
    assert not failures


def make_controller(costs, open_choices=()) -> Controller:
    shares = LayerShares(0.5, 0.5)
    which = (costs, 8, (3,), (None,), LAYERS, shares, LENGTH, 2, open_choices)
    return Controller(*which, padded=False, drop_stopped=True, ranks=1)


@torch.inference_mode()
def test_the_controller_is_made_when_costs_are_known(target):
    """And learns from passes and from what is accepted."""
    drafter = drafter_of(target, policy=clasp, make_controller=make_controller)
    drafter.drop_stopped = True
    assert drafter.controller is None
    drafter.start(CPU)
    assert drafter.controller is not None
    assert drafter.policy.controller is drafter.controller
    batch, evidence = target.batch(), drafter.controller.evidence
    trials, unsure = evidence._trials, evidence.drafts.variance[:3].copy()

    def confident(hidden, positions, step, rows, exact=None):
        return target.head(hidden).argmax(-1), torch.ones(len(rows))

    output = drafter.draft(batch, LENGTH, confident)
    assert evidence._trials > trials
    assert output.lengths.tolist() == [LENGTH] * 3
    lengths = output.lengths.numpy() + 1
    drafter.observe(batch.request_ids, lengths, torch.tensor([LENGTH - 1] * 3))
    assert (evidence.drafts.variance[:3] < unsure).all()


@torch.inference_mode()
def test_after_a_failure_nothing_is_drafted_for_a_while(target):
    """What failed may fail each time, and each time the engine may have made room for drafts in vain."""
    free = {"draft_layer": (0.0,), "draft_fixed": (0.0,)}
    drafter = drafter_of(
        target,
        policy=clasp,
        on_failure=lambda error, before: None,
        make_controller=lambda measured: make_controller(
            PassCosts((1.0,), (1.0,), (0.0,), **free), ("speculation",)
        ),
    )
    drafter.start(CPU)
    batch = target.batch()

    def broken(*_):
        raise ZeroDivisionError

    for _ in range(100):
        drafter.observe(batch.request_ids, np.ones(3, dtype=np.int64), None)
        drafter.draft(batch, LENGTH, broken)
    assert drafter.statistics.total.failures == 1


@torch.inference_mode()
@pytest.mark.parametrize("beside", [[], ["declined"]])
def test_steps_with_requests_that_are_not_drafted_for_are_timed_too(target, beside):
    """Else what drafts gain beside them would never be seen, and what they cost would."""
    drafter = drafter_of(target, policy=clasp, make_controller=make_controller)
    drafter.start(CPU)
    scale = drafter.controller.corrections.scales["verify_scale"]
    batch = target.batch()
    running = [*batch.request_ids, *beside]
    batch = replace(batch, running=running)

    def confident(hidden, positions, step, rows, exact=None):
        return target.head(hidden).argmax(-1), torch.ones(len(rows))

    before = scale.copy()
    for _ in range(2):
        drafter.draft(batch, LENGTH, confident)
        lengths = np.array([LENGTH + 1] * 3 + [1] * len(beside))
        drafter.observe(running, lengths, torch.tensor([LENGTH - 1] * 3 + [0] * len(beside)))
    assert (scale != before).any()


def test_rows_are_chosen_on_the_device():
    """An index on the host would make it wait for the device."""
    assert rows_index(np.array([0, 2]), 3, torch.device("meta")).device.type == "meta"
    assert rows_index(np.arange(3), 3, torch.device("meta")) == slice(None)


class Largest(TorchDispatchMode):
    """The largest float32 tensor that was made, in elements."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(made)[0]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("rows", [0, 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_top_probability_takes_little_memory(rows):
    logits = torch.randn(rows, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    with Largest() as largest:
        got = top_probability(logits)
    torch.testing.assert_close(got, logits.float().softmax(-1).amax(-1) if rows else torch.empty(0))
    assert largest.elements <= max(CHUNK * 50, rows)


def test_graphs_in_use_are_counted(target):
    passes = passes_of(target)
    assert passes.num_graphs == 0
    passes._graphs = lambda: SimpleNamespace(num_graphs=7)
    assert passes.num_graphs == 7


@torch.inference_mode()
def test_passes_are_priced_by_what_is_called_module_by_module(target):
    """As they are, where draft steps are replayed."""

    class Replayed:
        num_graphs, steps = 7, 0

        def takes(self, rows):
            return True

        def draft_step(self, batch, plan):
            self.steps += 1
            return passes.draft_step_eagerly(batch, plan)

        def head(self, hidden):
            return passes.head_eagerly(hidden)

    passes, graphs = passes_of(target), Replayed()
    assert passes.measure(CPU).pass_layer == ()
    passes._graphs = lambda: graphs
    costs = passes.measure(CPU)
    assert graphs.steps > 0
    assert len(costs.pass_layer) == len(costs.pass_fixed) == len(costs.rows)
