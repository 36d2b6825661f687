"""One drafting round for a batch: the same code for every model runner.

A round starts from the last sampled token of each sequence, whose keys and values are not in the
cache yet. Rows whose mask is due first go through the dynamic programme on that token: column 0
of it is the full model, so its prediction is the round's first draft and is accepted with
certainty. All other tokens are drafted by the target with each row's skipped layers left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from clasp_vllm.drafting.adaptive import AdaptiveDrafting
from clasp_vllm.drafting.batch import DraftBatch, PagedAttention, index
from clasp_vllm.drafting.decoder import Decoder
from clasp_vllm.drafting.evidence import SkipEvidence
from clasp_vllm.drafting.host import HostFlag, HostMasks
from clasp_vllm.drafting.outcomes import Drafts
from clasp_vllm.drafting.passes import Passes, Plan
from clasp_vllm.drafting.scratch import ScratchBlocks
from clasp_vllm.drafting.sequences import SequenceTable
from clasp_vllm.drafting.statistics import DraftStatistics
from clasp_vllm.drafting.timing import Mark
from clasp_vllm.skipping.controller import Choice
from clasp_vllm.skipping.dynamic_program import Programme, backtrack_all

# sample(hidden_states [rows, hidden_size], positions [rows], step) -> tokens [rows] int64 and, where
# the drafter has an exit threshold, their probabilities [rows] float32 under the draft.
Sample = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor | None]]

ENOUGH_PASSES = 8  # until the average over all is trusted with new sequences
Result = TypeVar("Result")
MAX_PLANS = 256  # kept; there is one for every set of sequences drafted for


@dataclass(frozen=True)
class DrafterOptions:
    """How to draft.

    Attributes:
        budgets: the numbers of layers to skip that there are to choose from, ascending. The last is
            the budget M of the dynamic programme.
        optimization_interval: rounds between two passes for a sequence, unless a controller says; None
            for fixed masks.
        max_optimized_requests: how many sequences may be optimised in one round.
        draft_exit_threshold: stop drafting a sequence after a token less probable than this; 0 = off.
    """

    budgets: tuple[int, ...]
    optimization_interval: int | None
    max_optimized_requests: int
    draft_exit_threshold: float

    @property
    def num_skipped_layers(self) -> int:
        """The largest budget."""
        return self.budgets[-1]


@dataclass(frozen=True)
class _Drafted:
    """Drafts made by skipping layers.

    Attributes:
        tokens: [rows, length] int64.
        lengths: [rows] int64, how many are worth verifying.
        due: rows whose layers were chosen anew; the first token of these is certain.
        marks: the start of the round, the end of its optimisation pass, and its end.
    """

    tokens: Tensor
    lengths: Tensor
    due: np.ndarray
    marks: tuple[Mark, Mark, Mark]


class Drafter:
    """Drafts with the target's own modules. Holds no parameters and no KV cache of its own."""

    def __init__(
        self,
        decoder: Decoder,
        attention: PagedAttention,
        scratch: ScratchBlocks | None,
        sequences: SequenceTable,
        options: DrafterOptions,
        predict: Callable[[Tensor], Tensor],
        evidence: SkipEvidence | None = None,
        adaptive: AdaptiveDrafting | None = None,
        share: Callable[[Tensor], Tensor] = lambda found: found,
        on_failure: Callable[[Exception, int], None] | None = None,
    ) -> None:
        """
        Args:
            predict: the model's head: [rows, hidden_size] to the [rows] int64 most likely tokens.
            evidence: of earlier passes, if they are to count.
            adaptive: the controller, if there is one.
            share: makes what a pass found the same on all ranks that run the layers together.
            on_failure: told of an exception while drafting and how many there were before; raises it
                where the engine cannot go on. None: all are raised.
        """
        self.decoder = decoder
        self.sequences = sequences
        self.options = options
        self.evidence = evidence
        self.adaptive = adaptive
        self.passes = Passes(decoder, attention, scratch, predict)
        # Leave sequences that have stopped out of further steps. It takes a host that knows which, as on a
        # CPU, and a ``sample`` to which rows are all alike.
        self.drop_stopped = False
        self.statistics = DraftStatistics(decoder.num_layers)
        self._share = share
        self._on_failure = on_failure
        self._new_masks = HostMasks()
        # What to run for the rows of a batch, until a mask changes.
        self._plans: dict[tuple[bytes, int, bool], Plan] = {}
        self._plans_version = -1
        self._budgets: Tensor | None = None
        self._predicted = 0.0  # seconds of the draft steps of this round

    def draft(self, batch: DraftBatch, num_tokens: int, sample: Sample) -> tuple[Tensor, Tensor] | None:
        """Draft up to ``num_tokens`` tokens for every sequence of the batch.

        Returns None if that failed and the engine can go on: a draft writes nothing that verification
        reads, so a step without drafts is as good as any other. Else:
            tokens: [rows, num_tokens] int64. All of them are valid to verify, those past a row's
                length merely unlikely to be accepted.
            lengths: [rows] int64, how many of a row's tokens are worth verifying.
        """
        return self.guarded(lambda: self._draft(batch, num_tokens, sample))

    def guarded(self, work: Callable[[], Result]) -> Result | None:
        """Do a part of drafting; None if that failed and the engine can go on."""
        try:
            return work()
        except Exception as error:
            if self._on_failure is None:
                raise
            self._on_failure(error, self.statistics.total.failures)
            self.statistics.total.failures += 1
            return None

    def observe(self, request_ids: Sequence[str], lengths: np.ndarray, rejected: Tensor | None) -> None:
        """Tell the controller of the engine's step that precedes a call of ``draft``.

        Args:
            request_ids: [reqs] all that were in the step.
            lengths: [reqs] int, tokens that each ran, drafts included.
            rejected: [reqs] int on the device, how many of its draft tokens were rejected; None if there
                were none.
        """
        controller = self._controlled
        if controller is not None:
            self.guarded(lambda: controller.observe(request_ids, lengths, rejected))

    @property
    def _controlled(self) -> AdaptiveDrafting | None:
        """The controller, once it knows what passes cost."""
        return self.adaptive if self.adaptive is not None and self.adaptive.costs is not None else None

    def _draft(self, batch: DraftBatch, num_tokens: int, sample: Sample) -> tuple[Tensor, Tensor]:
        rows, device = len(batch), batch.tokens.device
        sampling = np.zeros(rows, dtype=bool) if batch.sampling is None else batch.sampling
        slots = self._slots(batch.request_ids, sampling)
        self._apply_new_masks()
        choice = Choice(len(self.options.budgets) - 1, num_tokens, False)
        if self._controlled is not None:
            masks = self.sequences.masks, self.sequences.shared_mask
            choice = self._controlled.choose(slots, *masks, num_tokens, batch.ngrams)
        drafted = torch.zeros(rows, num_tokens, dtype=torch.int64, device=device)
        lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        looked_up = np.zeros(rows, dtype=bool)
        if choice.ngram and batch.ngrams is not None:
            for row, found in enumerate(batch.ngrams):
                tokens = torch.tensor(found[: choice.ngram], dtype=torch.int64)
                drafted[row, : len(tokens)], lengths[row] = tokens, len(tokens)
                looked_up[row] = bool(found)
        skipping = np.flatnonzero(~looked_up) if choice.length else np.empty(0, dtype=np.int64)
        by_skipping = None
        if skipping.size:
            by_skipping = self._draft_by_skipping(
                batch.select(skipping), slots[skipping], slots, choice, sample
            )
            on_device = _rows(skipping, rows)
            drafted[on_device, : choice.length], lengths[on_device] = by_skipping.tokens, by_skipping.lengths
        self.statistics.total.plain_steps += not choice.length and not choice.ngram
        self.statistics.total.ngrams += int(looked_up.sum())
        if self._controlled is not None:
            certain = np.zeros(rows, dtype=bool)
            if by_skipping is not None:
                certain[skipping[by_skipping.due]] = True
                self._controlled.timed(by_skipping.marks, self._predicted, by_skipping.due.size)
            drafts = Drafts(batch.request_ids, slots, sampling, looked_up, certain, lengths, choice)
            self._controlled.drafted(drafts, Mark(device) if by_skipping is None else by_skipping.marks[-1])
        return drafted, lengths

    def _draft_by_skipping(
        self, batch: DraftBatch, slots: np.ndarray, running: np.ndarray, choice: Choice, sample: Sample
    ) -> _Drafted:
        """Draft for the rows with layers left out, after choosing these anew where that is due.

        ``running``: slots of all sequences of the round.
        """
        rows, device = len(batch), batch.tokens.device
        started = Mark(device)
        due = self._due(slots, choice, len(running))
        exact = self._optimize(batch.select(due), slots[due], running) if due.size else None
        optimized = Mark(device)
        drafted = torch.zeros(rows, choice.length, dtype=torch.int64, device=device)
        lengths = torch.full((rows,), choice.length, dtype=torch.int64, device=device)
        self._predicted = 0.0
        going_on = HostFlag(device)
        left = np.arange(rows)  # rows of the batch still drafted for
        draft_steps = 0
        for step in range(choice.length):
            if step == 0 and exact is not None:
                hidden = self._first_hidden(batch, slots, due, exact, choice)
                draft_steps += due.size < rows
            else:
                hidden = self._draft_step(batch, self._sublayers(slots[left], choice, device))
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
        self.statistics.count_round(self._masks(slots, choice), draft_steps, due.size)
        return _Drafted(drafted, lengths, due, (started, optimized, Mark(device)))

    def _slots(self, request_ids: Sequence[str], sampling: np.ndarray) -> np.ndarray:
        slots = self.sequences.slots(request_ids)
        started = self.sequences.take_started()
        if self.adaptive is not None:
            for row in np.flatnonzero(np.isin(slots, started)):
                self.adaptive.evidence.start(slots[row], sampling[row])
        return slots

    def _due(self, slots: np.ndarray, choice: Choice, running: int) -> np.ndarray:
        interval = self.options.optimization_interval
        if interval is None:
            return np.empty(0, dtype=np.int64)
        if self._controlled is not None:
            interval = self._controlled.rounds_between_passes(choice, running)
        if self.evidence is not None and self.evidence.passes >= ENOUGH_PASSES:
            self.sequences.spread = interval
        return self.sequences.due(slots, interval, self.options.max_optimized_requests)

    def _apply_new_masks(self) -> None:
        ready = self._new_masks.take()
        if ready is not None:
            request_ids, masks, findings = ready
            if self.evidence is not None:
                self.sequences.set_initial_mask(masks[-2])
                self.sequences.set_shared_mask(masks[-1])
            self.sequences.set_masks(request_ids, masks[: len(request_ids)])
            if self._controlled is not None and findings is not None:
                self._controlled.learn(findings.numpy())

    def _optimize(self, batch: DraftBatch, slots: np.ndarray, running: np.ndarray) -> Tensor:
        """Find new masks for the batch; the full model's final hidden states [rows, hidden_size].

        Args:
            slots: [rows] of the batch.
            running: slots of all sequences now drafted for.
        """
        prior, device = None, batch.tokens.device
        if self.evidence is not None:
            on_device, fresh = index(slots, device), index(~self.sequences.has_own[slots], device)
            prior = self.evidence.prior(on_device, fresh)
        programme, hidden = self.run_programme(batch, prior)
        margins = self._share(programme.margins)
        # One broken state must not stay in the averages; where nothing is known the layer is run.
        margins = torch.where(margins.isnan(), -1.0 if prior is None else prior, margins)
        choices = margins > 0
        if self.evidence is not None:
            self.evidence.update(on_device, margins, prior)
            known = self.sequences.has_own[running] | np.isin(running, slots)
            shared = self.evidence.shared_choices(index(running, device), index(~known, device))
            choices = torch.cat((choices, self.evidence.overall_choices(), shared), dim=2)
        if self._budgets is None:  # kept on the device: a copy would wait for it
            self._budgets = torch.tensor(self.options.budgets, device=device)
        budgets = self._budgets
        layers = backtrack_all(choices, budgets)
        findings = None
        if self.adaptive is not None:
            findings = self._share(self.adaptive.findings(self.passes.agreement(programme, budgets)))
        masks = layers.unsqueeze(-1).expand(-1, -1, -1, 2)
        if self._new_masks.put(batch.request_ids, masks, findings):
            self._apply_new_masks()
        return hidden

    def run_programme(self, batch: DraftBatch, prior: Tensor | None = None) -> tuple[Programme, Tensor]:
        """The dynamic programme on one token per row, and the full model's final hidden states."""
        memory = self.evidence.memory if self.evidence else 0.0
        return self.passes.programme(batch, self.options.num_skipped_layers, prior, memory)

    def _first_hidden(
        self, batch: DraftBatch, slots: np.ndarray, due: np.ndarray, exact: Tensor, choice: Choice
    ) -> Tensor:
        """[rows, hidden_size]: the full model's states where optimised, the draft's elsewhere."""
        hidden = exact.new_empty(len(batch), exact.shape[1])
        hidden[index(due, exact.device)] = exact
        rest = np.setdiff1d(np.arange(len(batch)), due)
        if rest.size:
            plan = self._sublayers(slots[rest], choice, exact.device)
            hidden[index(rest, exact.device)] = self._draft_step(batch.select(rest), plan)
        return hidden

    def _draft_step(self, batch: DraftBatch, plan: Plan) -> Tensor:
        """One forward pass of the draft: [rows, hidden_size]."""
        self.statistics.total.sublayers += len(plan)
        if self._controlled is not None:
            self._predicted += self._controlled.forward_seconds(len(batch), len(plan) / 2)
        return self.passes.draft(batch, plan)

    def _masks(self, slots: np.ndarray, choice: Choice) -> Tensor:
        """[rows, num_layers, 2] bool, what each row skips."""
        if choice.shared:
            return self.sequences.shared_mask[choice.budget].expand(len(slots), -1, -1)
        return self.sequences.masks[torch.from_numpy(slots), choice.budget]

    def _sublayers(self, slots: np.ndarray, choice: Choice, device: torch.device) -> Plan:
        """The sub-layers that any row runs, each with the rows that skip it ([rows, 1] or None)."""
        if self._plans_version != self.sequences.version:
            self._plans.clear()
            self._plans_version = self.sequences.version
        key = b"" if choice.shared else slots.tobytes(), choice.budget, choice.shared
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            masks = self._masks(slots, choice)
            some, every = masks.any(0).tolist(), masks.all(0).tolist()
            on_device = masks.to(device, non_blocking=True)
            plan = self._plans[key] = [
                (layer, part, on_device[:, layer, part, None] if some[layer][part] else None)
                for layer in range(masks.shape[1])
                for part in range(2)
                if not every[layer][part]
            ]
        return plan

    @torch.inference_mode()
    def start(self, device: torch.device) -> None:
        """Before anything is served: forget the engine's warm-up, and find out what passes cost."""
        self.sequences.reset()
        self.statistics = DraftStatistics(self.decoder.num_layers)
        if self.evidence is not None:
            self.evidence.reset()
        if (
            self.adaptive is None or self.passes.attention.scratch_block < 1
        ):  # so small a cache is refused next
            return
        costs = self.passes.measure(device)
        shared = self._share(torch.tensor([costs.layer, costs.besides], device=device)).tolist()
        self.adaptive.costs = replace(costs, layer=tuple(shared[0]), besides=tuple(shared[1]))


def _rows(left: np.ndarray, rows: int) -> slice | Tensor:
    return slice(None) if len(left) == rows else torch.from_numpy(left)
