"""The forward passes that drafting is made of: draft steps and the dynamic programme, on the paged cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from clasp_vllm.drafting.batch import DraftBatch, PagedAttention
from clasp_vllm.drafting.decoder import Decoder
from clasp_vllm.drafting.plans import Plan
from clasp_vllm.drafting.scratch import ScratchBlocks
from clasp_vllm.drafting.timing import measure_pass_costs
from clasp_vllm.skipping.controller import PassCosts
from clasp_vllm.skipping.dynamic_program import Programme, State, run_programme
from clasp_vllm.skipping.items import Items
from clasp_vllm.skipping.mask import ATTENTION, evenly_spaced_layers

LARGEST_MEASURED = {"cpu": 64, "cuda": 512}  # rows of a pass; costs of larger ones lie on a line


class Passes:
    """Runs the target's layers for one query token per row."""

    def __init__(
        self,
        decoder: Decoder,
        attention: PagedAttention,
        scratch: ScratchBlocks | None,
        predict: Callable[[Tensor], Tensor],
    ) -> None:
        """``predict``: the model's head: [rows, hidden_size] to the [rows] int64 most likely tokens."""
        self._decoder = decoder
        self.attention = attention
        self.scratch = scratch
        self._predict = predict

    def draft(self, batch: DraftBatch, plan: Plan) -> Tensor:
        """One forward pass of the target without the skipped sub-layers: [rows, hidden_size]."""
        state = self._decoder.embed(batch.tokens)
        positions = self._rotary(batch.positions)
        with self.attention.decode(batch.positions, batch.block_table, batch.max_lengths):
            for layer, part, skip in plan:
                if skip is None:
                    state = self._decoder.run_sublayer(layer, part, positions, state)
                else:  # some rows skip it: run it for all, keep their states
                    delta, residual = state
                    ran = self._decoder.run_sublayer(
                        layer, part, positions, (delta.clone(), residual.clone())
                    )
                    state = torch.where(skip, delta, ran[0]), torch.where(skip, residual, ran[1])
            return self._decoder.finish(state)

    def programme(
        self, batch: DraftBatch, items: Items, budget: int, prior: Tensor | None, memory: float
    ) -> tuple[Programme, Tensor]:
        """The dynamic programme on one token per row, and the full model's final hidden states."""
        parts = len(items.costs) // items.num_layers
        assert self.scratch is not None
        rows = len(batch)
        tables, source, target = self.scratch.virtual_requests(batch.block_table, batch.positions)
        positions = batch.positions.repeat(budget + 1)
        max_lengths = batch.max_lengths.repeat(budget + 1)
        rotary_positions = self._rotary(positions)
        columns, through = 0, items.columns(budget)

        with ExitStack() as context:

            def layer(i: int, state: State) -> State:
                nonlocal columns
                if columns != through[i]:
                    columns = through[i]
                    first = slice(columns * rows)  # column-major
                    context.close()
                    context.enter_context(
                        self.attention.decode(positions[first], tables[first], max_lengths[first])
                    )
                index, part = divmod(i, parts)
                if columns > 1 and part == ATTENTION:
                    self.attention.copy_blocks(index, source, target[:, : columns - 1])
                if parts == 1:
                    return self._decoder.run_layer(index, rotary_positions[: columns * rows], state)
                return self._decoder.run_sublayer(index, part, rotary_positions[: columns * rows], state)

            state = self._decoder.embed(batch.tokens)
            programme = run_programme(state, layer, len(items.costs), budget, prior, memory, items.costs)
            delta, residual = (x[0].clone() for x in programme.states)
            return programme, self._decoder.finish((delta, residual))

    def agreement(self, programme: Programme, budgets: Tensor) -> Tensor:
        """[rows, budgets] bool: the state of the budget ([budgets] int64) predicts the full model's token."""
        states = (torch.cat((x[:1], x.index_select(0, budgets))).flatten(0, 1) for x in programme.states)
        delta, residual = states
        tokens = self._predict(self._decoder.finish((delta, residual))).view(len(budgets) + 1, -1)
        return (tokens[1:] == tokens[0]).t()

    def replay(self, batch: DraftBatch, tokens: Tensor, mask: Tensor) -> Tensor:
        """Which of a sequence's last tokens the draft says again, the true ones before them given.

        All in one pass, whose keys and values go to scratch blocks (SWIFT, section 4.2).

        Args:
            batch: of one row.
            tokens: [window + 1] int64 on the host, the sequence's last; the last of all is the batch's own.
            mask: [num_layers, 2] bool on the host, True = skipped.

        Returns:
            [window] bool.
        """
        device, window, size = batch.tokens.device, len(tokens) - 1, self.attention.block_size
        tokens = tokens.to(device)
        positions = batch.positions - torch.arange(window, 0, -1, device=device)
        first, last = int(positions[0]) // size, int(positions[-1]) // size
        source = batch.block_table[0, first : last + 1].long()
        target = self.attention.scratch_block + torch.arange(last + 1 - first, device=device)
        table = batch.block_table.clone()
        table[0, first : last + 1] = target.int()
        lengths = batch.max_lengths.expand(window)
        state, rotary = self._decoder.embed(tokens[:-1]), self._rotary(positions)
        with self.attention.decode(positions, table.repeat(window, 1), lengths):
            for layer, part in (~mask).nonzero().tolist():
                if part == ATTENTION:
                    self.attention.copy_blocks(layer, source, target.unsqueeze(1))
                state = self._decoder.run_sublayer(layer, part, rotary, state)
            return self._predict(self._decoder.finish(state)) == tokens[1:]

    def measure(self, device: torch.device) -> PassCosts:
        """What passes cost, while nothing is served. Writes to the scratch block."""
        num_layers, position = self._decoder.num_layers, self.attention.block_size - 1
        position = min(position, self.attention.max_model_len - 1)

        def forward(rows: int, layers: int) -> None:
            skipped = evenly_spaced_layers(num_layers, num_layers - layers)
            plan: Plan = [(i, part, None) for i in range(num_layers) if i not in skipped for part in range(2)]
            tokens = torch.zeros(rows, dtype=torch.int64, device=device)
            table = torch.full((rows, 1), self.attention.scratch_block, dtype=torch.int32, device=device)
            lengths = torch.full((rows,), position + 1, dtype=torch.int32)
            self._predict(self.draft(DraftBatch([], tokens, tokens + position, table, lengths), plan))

        longest = min(self.attention.max_rows, LARGEST_MEASURED.get(device.type, 64))
        synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        return measure_pass_costs(forward, num_layers, longest, synchronize)

    def _rotary(self, positions: Tensor) -> Tensor:
        # Past the end there is nothing to draft, but the rotary table must still hold the position.
        return positions.clamp(max=self.attention.max_model_len - 1)
