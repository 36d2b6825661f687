"""One drafting round for a batch: the same code for every model runner.

A round starts from the last sampled token of each sequence, whose keys and values are not in the
cache yet. Rows whose mask is due first go through the dynamic programme on that token: column 0
of it is the full model, so its prediction is the round's first draft and is accepted with
certainty. All other tokens are drafted by the target with each row's skipped layers left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from clasp_vllm.drafting.decoder import Decoder
from clasp_vllm.drafting.evidence import SkipEvidence
from clasp_vllm.drafting.host import HostFlag, HostMasks
from clasp_vllm.drafting.scratch import ScratchBlocks
from clasp_vllm.drafting.sequences import SequenceTable
from clasp_vllm.drafting.statistics import DraftStatistics
from clasp_vllm.skipping.dynamic_program import Programme, State, backtrack, columns_at, run_programme


class PagedAttention(Protocol):
    """What drafting needs of the engine's attention."""

    max_model_len: int  # tokens that the cache holds of one sequence at most

    def decode(
        self, positions: Tensor, block_table: Tensor, max_lengths: Tensor
    ) -> AbstractContextManager[None]:
        """A forward context for one query token per row.

        Each row attends to, and writes the key and value of, its position in the blocks of its row
        of ``block_table`` ([rows, width] int32); ``max_lengths`` ([rows] int32, on the host) bounds
        positions + 1 from above. Positions from ``max_model_len`` on write nothing.
        """
        ...

    def copy_blocks(self, layer: int, source: Tensor, target: Tensor) -> None:
        """Copy block ``source[i]`` over blocks ``target[i]`` ([n] and [n, copies] int64) of a layer.

        The blocks of each row of ``target`` are consecutive.
        """
        ...


@dataclass(frozen=True)
class DraftBatch:
    """The sequences to draft for: those that have just sampled a token.

    Attributes:
        request_ids: [rows] names of the sequences.
        tokens: [rows] int, each sequence's last sampled token.
        positions: [rows] int64, the position of that token.
        block_table: [rows, width] int32.
        max_lengths: [rows] int32 on the host, at least positions + 1.
    """

    request_ids: Sequence[str]
    tokens: Tensor
    positions: Tensor
    block_table: Tensor
    max_lengths: Tensor

    def __len__(self) -> int:
        return len(self.request_ids)

    def select(self, rows: np.ndarray) -> DraftBatch:
        """The given rows."""
        if len(rows) == len(self) and (rows == np.arange(len(self))).all():
            return self
        on_device = _index(rows, self.tokens.device)
        return DraftBatch(
            [self.request_ids[row] for row in rows],
            self.tokens[on_device],
            self.positions[on_device],
            self.block_table[on_device],
            self.max_lengths[torch.from_numpy(rows)],
        )


# sample(hidden_states [rows, hidden_size], positions [rows], step) -> tokens [rows] int64 and, where
# the drafter has an exit threshold, their probabilities [rows] float32 under the draft.
Sample = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor | None]]


ENOUGH_PASSES = 8  # until the average over all is trusted with new sequences
MAX_PLANS = 256  # kept; there is one for every set of sequences drafted for
# The sub-layers to run: layer, part, and the rows that skip it ([rows, 1] bool) or None.
Plan = list[tuple[int, int, Tensor | None]]


@dataclass(frozen=True)
class DrafterOptions:
    """How to draft.

    Attributes:
        num_skipped_layers: the budget M of the dynamic programme.
        optimization_interval: rounds between two passes for a sequence; None for fixed masks.
        max_optimized_requests: how many sequences may be optimised in one round.
        draft_exit_threshold: stop drafting a sequence after a token less probable than this; 0 = off.
    """

    num_skipped_layers: int
    optimization_interval: int | None
    max_optimized_requests: int
    draft_exit_threshold: float


class Drafter:
    """Drafts with the target's own modules. Holds no parameters and no KV cache of its own."""

    def __init__(
        self,
        decoder: Decoder,
        attention: PagedAttention,
        scratch: ScratchBlocks | None,
        sequences: SequenceTable,
        options: DrafterOptions,
        evidence: SkipEvidence | None = None,
        share: Callable[[Tensor], Tensor] = lambda margins: margins,
        on_failure: Callable[[Exception, int], None] | None = None,
    ) -> None:
        """
        Args:
            evidence: of earlier passes, if they are to count.
            share: makes the programme's margins the same on all ranks that run the layers together.
            on_failure: told of an exception while drafting and how many there were before; raises it
                where the engine cannot go on. None: all are raised.
        """
        self.decoder = decoder
        self.attention = attention
        self.scratch = scratch
        self.sequences = sequences
        self.options = options
        self.evidence = evidence
        # Leave sequences that have stopped out of further steps. It takes a host that knows which, as on a
        # CPU, and a ``sample`` to which rows are all alike.
        self.drop_stopped = False
        self.statistics = DraftStatistics(decoder.num_layers)
        self._share = share
        self._on_failure = on_failure
        self._new_masks = HostMasks()
        # What to run for the rows of a batch, until a mask changes.
        self._plans: dict[bytes, Plan] = {}
        self._plans_version = -1

    def draft(self, batch: DraftBatch, num_tokens: int, sample: Sample) -> tuple[Tensor, Tensor] | None:
        """Draft up to ``num_tokens`` tokens for every sequence of the batch.

        Returns None if that failed and the engine can go on: a draft writes nothing that verification
        reads, so a step without drafts is as good as any other. Else:
            tokens: [rows, num_tokens] int64. All of them are valid to verify, those past a row's
                length merely unlikely to be accepted.
            lengths: [rows] int64, how many of a row's tokens are worth verifying.
        """
        try:
            return self._draft(batch, num_tokens, sample)
        except Exception as error:
            if self._on_failure is None:
                raise
            self._on_failure(error, self.statistics.total.failures)
            self.statistics.total.failures += 1
            return None

    def _draft(self, batch: DraftBatch, num_tokens: int, sample: Sample) -> tuple[Tensor, Tensor]:
        rows, device = len(batch), batch.tokens.device
        slots = self.sequences.slots(batch.request_ids)
        self._apply_new_masks()
        due = self._due(slots)
        exact = self._optimize(batch.select(due), slots[due]) if due.size else None

        drafted = torch.zeros(rows, num_tokens, dtype=torch.int64, device=device)
        lengths = torch.full((rows,), num_tokens, dtype=torch.int64, device=device)
        going_on = HostFlag(device)
        left = np.arange(rows)  # rows of the batch still drafted for
        draft_steps = 0
        for step in range(num_tokens):
            if step == 0 and exact is not None:
                hidden = self._first_hidden(batch, slots, due, exact)
                draft_steps += due.size < rows
            else:
                hidden = self._draft_step(batch, slots[left])
                draft_steps += 1
            tokens, probability = sample(hidden, batch.positions, step)
            drafted[_rows(left, rows), step] = tokens
            batch = replace(
                batch,
                tokens=tokens,
                positions=batch.positions + 1,
                max_lengths=batch.max_lengths + 1,
            )
            if probability is None:
                continue
            unsure = probability < self.options.draft_exit_threshold
            if self.drop_stopped:
                lengths[torch.from_numpy(left[unsure.numpy()])] = step + 1
                stay = np.flatnonzero(~unsure.numpy())
                batch, left = batch.select(stay), left[stay]
                if left.size == 0:
                    break
            else:
                lengths = torch.where(unsure, lengths.clamp(max=step + 1), lengths)
                if not going_on.update((lengths > step + 1).any()):
                    drafted[:, step + 1 :] = tokens.unsqueeze(1)
                    break

        self.sequences.advance(slots, due)
        self.statistics.count_round(self.sequences.masks[torch.from_numpy(slots)], draft_steps, due.size)
        return drafted, lengths

    def _due(self, slots: np.ndarray) -> np.ndarray:
        interval = self.options.optimization_interval
        if interval is None:
            return np.empty(0, dtype=np.int64)
        return self.sequences.due(slots, interval, self.options.max_optimized_requests)

    def _apply_new_masks(self) -> None:
        ready = self._new_masks.take()
        if ready is not None:
            request_ids, masks = ready
            if self.evidence is not None:
                self.sequences.set_initial_mask(masks[-1])
                if self.evidence.passes >= ENOUGH_PASSES:
                    self.sequences.spread = self.options.optimization_interval
            self.sequences.set_masks(request_ids, masks[: len(request_ids)])

    def _optimize(self, batch: DraftBatch, slots: np.ndarray) -> Tensor:
        """Find new masks for the batch; the full model's final hidden states [rows, hidden_size]."""
        prior = None
        if self.evidence is not None:
            device = batch.tokens.device
            on_device, fresh = _index(slots, device), _index(~self.sequences.has_own[slots], device)
            prior = self.evidence.prior(on_device, fresh)
        programme, hidden = self.run_programme(batch, prior)
        margins = self._share(programme.margins)
        # One broken state must not stay in the averages; where nothing is known the layer is run.
        margins = torch.where(margins.isnan(), -1.0 if prior is None else prior, margins)
        choices = margins > 0
        if self.evidence is not None:
            self.evidence.update(on_device, margins, prior)
            choices = torch.cat((choices, self.evidence.overall_choices()), dim=2)
        layers = backtrack(choices, self.options.num_skipped_layers)
        if self._new_masks.put(batch.request_ids, layers.unsqueeze(-1).expand(-1, -1, 2)):
            self._apply_new_masks()
        return hidden

    def run_programme(self, batch: DraftBatch, prior: Tensor | None = None) -> tuple[Programme, Tensor]:
        """The dynamic programme on one token per row, and the full model's final hidden states."""
        assert self.scratch is not None
        budget, rows = self.options.num_skipped_layers, len(batch)
        tables, source, target = self.scratch.virtual_requests(batch.block_table, batch.positions)
        positions = batch.positions.repeat(budget + 1)
        max_lengths = batch.max_lengths.repeat(budget + 1)
        rotary_positions = self._rotary(positions)
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
                if columns > 1:
                    self.attention.copy_blocks(i, source, target[:, : columns - 1])
                return self.decoder.run_layer(i, rotary_positions[: columns * rows], state)

            programme = run_programme(
                self.decoder.embed(batch.tokens),
                layer,
                self.decoder.num_layers,
                budget,
                prior,
                self.evidence.memory if self.evidence else 0.0,
            )
            delta, residual = (x[0].clone() for x in programme.states)
            return programme, self.decoder.finish((delta, residual))

    def _first_hidden(self, batch: DraftBatch, slots: np.ndarray, due: np.ndarray, exact: Tensor) -> Tensor:
        """[rows, hidden_size]: the full model's states where optimised, the draft's elsewhere."""
        hidden = exact.new_empty(len(batch), exact.shape[1])
        hidden[_index(due, exact.device)] = exact
        rest = np.setdiff1d(np.arange(len(batch)), due)
        if rest.size:
            hidden[_index(rest, exact.device)] = self._draft_step(batch.select(rest), slots[rest])
        return hidden

    def _draft_step(self, batch: DraftBatch, slots: np.ndarray) -> Tensor:
        """One forward pass of the target without the skipped sub-layers: [rows, hidden_size]."""
        state = self.decoder.embed(batch.tokens)
        positions = self._rotary(batch.positions)
        plan = self._sublayers(slots, positions.device)
        self.statistics.total.sublayers += len(plan)
        with self.attention.decode(batch.positions, batch.block_table, batch.max_lengths):
            for layer, part, skip in plan:
                if skip is None:
                    state = self.decoder.run_sublayer(layer, part, positions, state)
                else:  # some rows skip it: run it for all, keep their states
                    delta, residual = state
                    ran = self.decoder.run_sublayer(layer, part, positions, (delta.clone(), residual.clone()))
                    state = torch.where(skip, delta, ran[0]), torch.where(skip, residual, ran[1])
            return self.decoder.finish(state)

    def _rotary(self, positions: Tensor) -> Tensor:
        # Past the end there is nothing to draft, but the rotary table must still hold the position.
        return positions.clamp(max=self.attention.max_model_len - 1)

    def _sublayers(self, slots: np.ndarray, device: torch.device) -> Plan:
        """The sub-layers that any row runs, each with the rows that skip it ([rows, 1] or None)."""
        if self._plans_version != self.sequences.version:
            self._plans.clear()
            self._plans_version = self.sequences.version
        plan = self._plans.get(slots.tobytes())
        if plan is None:
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            masks = self.sequences.masks[torch.from_numpy(slots)]  # [rows, num_layers, 2]
            some, every = masks.any(0).tolist(), masks.all(0).tolist()
            on_device = masks.to(device, non_blocking=True)
            plan = self._plans[slots.tobytes()] = [
                (layer, part, on_device[:, layer, part, None] if some[layer][part] else None)
                for layer in range(masks.shape[1])
                for part in range(2)
                if not every[layer][part]
            ]
        return plan


def _rows(left: np.ndarray, rows: int) -> slice | Tensor:
    return slice(None) if len(left) == rows else torch.from_numpy(left)


def _index(rows: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(rows).to(device, non_blocking=True)
