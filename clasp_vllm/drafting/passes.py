"""The forward passes that drafting is made of: draft steps and the dynamic programme, on the paged cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from clasp_vllm.control.costs import ContextPass, PassCosts, measure_context_costs, measure_pass_costs
from clasp_vllm.device import synchronize, to_device
from clasp_vllm.drafting.batch import PagedAttention, SequenceBatch
from clasp_vllm.drafting.context import CacheRows, cut_context
from clasp_vllm.drafting.decoder import Decoder
from clasp_vllm.drafting.plans import Plan
from clasp_vllm.drafting.scratch import ScratchBlocks
from clasp_vllm.skipping.dynamic_program import Programme, State, columns_at, run_programme
from clasp_vllm.skipping.skip_mask import evenly_spaced_layers

CHUNK = 128  # rows
LARGEST_MEASURED = {"cpu": 64, "cuda": 512}  # rows of a pass; costs of larger ones lie on a line
# Tokens of context: from where on they are worth measuring, and the most; more of them cost in proportion.
LEAST_CONTEXT, LONGEST_MEASURED = 1024, 2048
CONTEXT_ROWS = 8


class DraftRunner(Protocol):
    """Something that runs draft steps faster than eager calls, where it can."""

    num_graphs: int

    def takes(self, rows: int) -> bool:
        """Whether it runs steps of so many rows."""
        ...

    def draft_step(self, batch: SequenceBatch, plan: Plan) -> Tensor:
        """See ``Passes.draft_step``. The result is overwritten by the next step."""
        ...

    def head(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Passes.head``. The results are overwritten by the next call."""
        ...


@dataclass(frozen=True)
class Model:
    """A model that can be run in parts: the target, or what drafts run instead of it.

    Attributes:
        logits: the head: [rows, hidden_size] final states to [rows, vocab_size].
    """

    decoder: Decoder
    logits: Callable[[Tensor], Tensor]


class Passes:
    """Runs layers of the target, or of what drafts for it, for one query token per row.

    Attributes:
        own_weights: whether drafts run other weights than the target's.
    """

    def __init__(
        self,
        target: Model,
        attention: PagedAttention,
        scratch: ScratchBlocks | None,
        graphs: Callable[[], DraftRunner | None] = lambda: None,
        draft: Model | None = None,
    ) -> None:
        """
        Args:
            graphs: what runs draft steps of some sizes, if there is something now.
            draft: the target with other weights, to draft with; None: the target itself.
        """
        self._target = target
        self._draft = draft or target
        self.own_weights = draft is not None
        self.attention = attention
        self.scratch = scratch
        self._graphs = graphs

    @property
    def draft_decoder(self) -> Decoder:
        """The layers that draft steps run: the target's, or those with weights of their own."""
        return self._draft.decoder

    @property
    def num_graphs(self) -> int:
        """How many graphs of draft steps are in use; 0 where they are eager calls."""
        graphs = self._graphs()
        return 0 if graphs is None else graphs.num_graphs

    def _runner(self, rows: int) -> DraftRunner | None:
        graphs = self._graphs()
        return graphs if graphs is not None and graphs.takes(rows) else None

    def draft_step(self, batch: SequenceBatch, plan: Plan) -> Tensor:
        """One forward pass of the target without the skipped sub-layers: [rows, hidden_size]."""
        runner = self._runner(len(batch.tokens))
        return self.draft_step_eagerly(batch, plan) if runner is None else runner.draft_step(batch, plan)

    def draft_step_eagerly(self, batch: SequenceBatch, plan: Plan) -> Tensor:
        """The same by calling one module after the other."""
        return self._run(self._draft.decoder, batch, plan, self.cache_rows(batch, plan.window))

    def cache_rows(self, batch: SequenceBatch, window: int | None) -> CacheRows:
        """Where a batch reads and writes, attending to all or to a window."""
        rows = CacheRows(batch.positions, batch.block_table, batch.max_lengths)
        size, limit, sink = self.attention.block_size, self.attention.max_model_len, self.attention.sink
        return cut_context(rows, window, size, limit, sink)

    def _run(self, decoder: Decoder, batch: SequenceBatch, plan: Plan, rows: CacheRows) -> Tensor:
        state = decoder.embed(batch.tokens)
        positions = self._rotary(batch.positions)
        with self.attention.decode(*rows):
            for layer, part, mixed in plan.steps:
                if not mixed:
                    state = decoder.run_sublayer(layer, part, positions, state)
                    continue
                assert plan.masks is not None
                skip = plan.masks[:, layer, part, None]
                state = run_for_some(decoder, layer, part, positions, state, skip)
            return decoder.finish(state)

    def logits(self, hidden: Tensor, exact: np.ndarray | None = None) -> Tensor:
        """[rows, vocab_size] of final states, by the draft's head.

        ``exact``: [n] int64, rows that hold final states of the target, and so go through its head.
        """
        if exact is None or not self.own_weights:
            return self._draft.logits(hidden)
        if len(exact) == len(hidden):
            return self._target.logits(hidden)
        logits, at = self._draft.logits(hidden), to_device(exact, hidden.device)
        logits[at] = self._target.logits(hidden[at])
        return logits

    def head(self, hidden: Tensor, exact: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Logits as above, and the likeliest token's probability [rows] float32."""
        runner = self._runner(len(hidden)) if exact is None or not self.own_weights else None
        return self.head_eagerly(hidden, exact) if runner is None else runner.head(hidden)

    def head_eagerly(self, hidden: Tensor, exact: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """The same by calling the head."""
        logits = self.logits(hidden, exact)
        return logits, top_probability(logits)

    def programme(
        self,
        batch: SequenceBatch,
        budget: int,
        prior: Tensor | None,
        memory: float,
        centre: Tensor | None,
        window: int | None = None,
    ) -> tuple[Programme, Tensor]:
        """The dynamic programme on one token per row, and the target's final hidden states.

        ``window``: of the drafts, see ``drafting.context``. The target attends to all.
        """
        assert self.scratch is not None
        rows, decoder = len(batch), self._draft.decoder
        at = self.cache_rows(batch, window)
        tables, source, target = self.scratch.virtual_requests(at.block_table, at.positions)
        # Column 0 works on the requests' own blocks where it is the target itself.
        own = int(not self.own_weights and at.block_table is batch.block_table)
        tables = tables[(1 - own) * rows :]
        positions, max_lengths = at.positions.repeat(budget + 1), at.max_lengths.repeat(budget + 1)
        rotary_positions = self._rotary(batch.positions.repeat(budget + 1))
        reference, hidden = (None, None) if own else self._reference(batch)
        columns = 0

        with ExitStack() as context:

            def layer(i: int, state: State) -> State:
                nonlocal columns
                if columns != columns_at(i, budget):
                    columns = columns_at(i, budget)
                    first = slice(columns * rows)  # column-major
                    context.close()
                    context.enter_context(
                        self.attention.decode(positions[first], tables[first], max_lengths[first])
                    )
                if columns > own:
                    self.attention.copy_blocks(i, source, target[:, : columns - own])
                return decoder.run_layer(i, rotary_positions[: columns * rows], state)

            state = decoder.embed(batch.tokens)
            programme = run_programme(
                state, layer, decoder.num_layers, budget, prior, memory, centre, reference
            )
            if hidden is None:
                delta, residual = (x[0].clone() for x in programme.states)
                hidden = decoder.finish((delta, residual))
            return programme, hidden

    def _reference(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """The target's [num_layers, rows, hidden_size] float32 states, and its final hidden states."""
        decoder, states = self._target.decoder, []
        positions = self._rotary(batch.positions)
        with self.attention.decode(batch.positions, batch.block_table, batch.max_lengths):
            state = decoder.embed(batch.tokens)
            for i in range(decoder.num_layers):
                state = decoder.run_layer(i, positions, state)
                states.append((state[0] + state[1]).float())
            return torch.stack(states), decoder.finish(state)

    def agreement(self, programme: Programme, budgets: Tensor, hidden: Tensor) -> Tensor:
        """[rows, budgets] bool: the state of the budget ([budgets] int64) predicts the target's token.

        ``hidden``: [rows, hidden_size], the target's final hidden states.
        """
        delta, residual = (x.index_select(0, budgets).flatten(0, 1) for x in programme.states)
        drafts = self._draft.decoder.finish((delta, residual))
        exact = np.arange(len(hidden))
        tokens = self.logits(torch.cat((hidden, drafts)), exact).argmax(-1).view(len(budgets) + 1, -1)
        return (tokens[1:] == tokens[0]).t()

    def measure(self, device: torch.device) -> PassCosts:
        """What passes cost, while nothing is served. Writes to the scratch block."""
        costs = self._measure(self._target, device)
        # Passes of several queries run eagerly, which tells nothing of the engine's graphs. Kernels for GPUs
        # read a request's context once for all of its queries.
        several = not self.num_graphs
        context = self._read_context(device)
        costs = measure_context_costs(costs, context, self._target.decoder.num_layers, several=several)
        if self.own_weights:
            draft = self._measure(self._draft, device)
            costs = replace(costs, draft_layer=draft.layer, draft_fixed=draft.fixed)
        if self.num_graphs:
            eager = self._measure(self._draft, device, eagerly=True)
            costs = replace(costs, pass_layer=eager.layer, pass_fixed=eager.fixed)
        return costs

    def _measure(self, model: Model, device: torch.device, eagerly: bool = False) -> PassCosts:
        def forward(rows: int, layers: int) -> None:
            self._forward(model, rows, layers, self.attention.scratch_block, device, eagerly)

        longest = min(self.attention.max_rows, LARGEST_MEASURED.get(device.type, 64))
        return measure_pass_costs(forward, model.decoder.num_layers, longest, lambda: synchronize(device))

    def _read_context(self, device: torch.device) -> ContextPass | None:
        """Drafts of rows that attend to many tokens; None where the cache holds too few of them."""
        size, limit = self.attention.block_size, self.attention.max_model_len
        most = min(limit, LONGEST_MEASURED, self.attention.scratch_block * size) // size * size
        if most < max(LEAST_CONTEXT, 2 * size):
            return None

        def forward(rows: int, tokens: int, queries: int) -> None:
            blocks = tokens // size
            # Blocks of their own, as far as there are, for blocks that are read twice are in a cache by then.
            table = torch.arange(rows * blocks, dtype=torch.int32, device=device).view(rows, blocks)
            table = table % (self.attention.scratch_block - 1) + 1
            table[:, -1] = self.attention.scratch_block
            positions = torch.arange(tokens - queries, tokens, device=device).repeat(rows)
            lengths = torch.full((rows,), tokens, dtype=torch.int32)
            batch = SequenceBatch([], torch.zeros_like(positions), positions, table, lengths)
            self._whole_pass(self._draft, batch, self._draft.decoder.num_layers)
            synchronize(device)

        return ContextPass(forward, size, most, min(CONTEXT_ROWS, self.attention.max_rows))

    @torch.inference_mode()
    def try_out(self, device: torch.device) -> None:
        """Run a draft step, so that what cannot draft fails now, and kernels have what they keep.

        Writes to the null block.
        """
        self._forward(self._draft, 1, self._draft.decoder.num_layers, 0, device)
        synchronize(device)

    def _forward(
        self,
        model: Model,
        rows: int,
        layers: int,
        block: int,
        device: torch.device,
        eagerly: bool = False,
    ) -> None:
        """A pass of rows that all stand at the end of a block, and what they predict."""
        position = min(self.attention.block_size, self.attention.max_model_len) - 1
        tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        table = torch.full((rows, 1), block, dtype=torch.int32, device=device)
        lengths = torch.full((rows,), position + 1, dtype=torch.int32)
        batch = SequenceBatch([], tokens, tokens + position, table, lengths)
        self._whole_pass(model, batch, layers, eagerly)

    def _whole_pass(self, model: Model, batch: SequenceBatch, layers: int, eagerly: bool = False) -> None:
        """So many layers, and what they predict. ``eagerly``: without graphs, where there are some."""
        num_layers = model.decoder.num_layers
        skipped = evenly_spaced_layers(num_layers, num_layers - layers)
        plan = Plan([(i, part, False) for i in range(num_layers) if i not in skipped for part in range(2)])
        if model is self._draft and len(batch.tokens) == len(batch.block_table) and not eagerly:
            self.head(self.draft_step(batch, plan))[0].argmax(-1)
        else:
            model.logits(self._run(model.decoder, batch, plan, self.cache_rows(batch, None))).argmax(-1)

    def _rotary(self, positions: Tensor) -> Tensor:
        # Past the end there is nothing to draft, but the rotary table must still hold the position.
        return positions.clamp(max=self.attention.max_model_len - 1)


def run_for_some(
    decoder: Decoder, layer: int, part: int, positions: Tensor, state: State, skip: Tensor
) -> State:
    """Run a sub-layer for all rows and keep the state of those that ``skip`` it ([rows, 1] bool)."""
    delta, residual = state
    ran = decoder.run_sublayer(layer, part, positions, (delta.clone(), residual.clone()))
    return torch.where(skip, delta, ran[0]), torch.where(skip, residual, ran[1])


def finite(logits: Tensor) -> Tensor:
    """Logits that tokens can be drawn from, in place: in float16 a draft may come to NaN or infinities."""
    return logits.nan_to_num_(nan=0.0, posinf=1e4, neginf=-1e4)


def top_probability(logits: Tensor) -> Tensor:
    """[rows, vocab_size] logits to the [rows] float32 probability of the likeliest token."""
    # In parts: for a large batch a float32 copy of all logits takes over a gigabyte.
    parts = (logits[start : start + CHUNK].float() for start in range(0, max(len(logits), 1), CHUNK))
    return torch.cat([(part.amax(-1) - part.logsumexp(-1)).exp() for part in parts])
