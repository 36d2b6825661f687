"""One drafting round for a batch: the same code for every model runner.

A round starts from the last sampled token of each sequence, whose keys and values are not in the
cache yet. Rows whose mask is due first go through the dynamic programme on that token: the pass
runs the target too, so its prediction is the round's first draft and is accepted with
certainty. All other tokens are drafted by the target with each row's skipped layers left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from clasp_vllm.control.controller import Controller
from clasp_vllm.control.costs import PassCosts, measure_steps
from clasp_vllm.control.early_exit import Exit, FixedExit
from clasp_vllm.control.planner import Choice
from clasp_vllm.control.verification import UnverifiedDrafts
from clasp_vllm.device import DeviceEvent, rows_index, to_device
from clasp_vllm.drafting.batch import PromptTokens, SequenceBatch
from clasp_vllm.drafting.decoder import Decoder
from clasp_vllm.drafting.draft import DrafterOptions, DraftOutput, DraftRound, LayerSkipDraft, Sample
from clasp_vllm.drafting.observer import RoundObserver
from clasp_vllm.drafting.passes import Passes
from clasp_vllm.drafting.plans import Plan, Plans
from clasp_vllm.drafting.policy import Policy
from clasp_vllm.drafting.sequences import SequenceTable
from clasp_vllm.drafting.statistics import DraftStatistics
from clasp_vllm.drafting.tokens import DraftTokenBuffer

Result = TypeVar("Result")


class Drafter:
    """Drafts with the target's own modules. Holds no parameters and no KV cache of its own."""

    def __init__(
        self,
        decoder: Decoder,
        passes: Passes,
        sequences: SequenceTable,
        policy: Policy,
        options: DrafterOptions,
        make_controller: Callable[[PassCosts], Controller] | None = None,
        share: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        on_failure: Callable[[Exception, int], None] | None = None,
    ) -> None:
        """
        Args:
            policy: who chooses the layers, of these sequences.
            make_controller: given what passes cost, the controller, if there is to be one.
            share: makes the result of a pass the same on all ranks that run the layers together.
            on_failure: told of an exception while drafting and how many there were before; raises it
                where the engine cannot go on. None: all are raised, as all before the start has ended.
        """
        self.decoder = decoder
        self.sequences = sequences
        self.options = options
        self.policy = policy
        self.controller: Controller | None = None  # from the start on
        self._make_controller = make_controller
        self.passes = passes
        # Leave sequences that have stopped out of further steps. It takes a host that knows which: a CPU.
        self.drop_stopped = False
        self.observer: RoundObserver | None = None  # told of every round
        self.statistics = DraftStatistics(decoder.num_layers)
        self._share = share
        self._on_failure = on_failure
        self._serving = False
        self._plans: Plans | None = None
        self._predicted = 0.0  # seconds of the draft steps of this round

    def draft(self, batch: SequenceBatch, num_tokens: int, sample: Sample) -> DraftOutput | None:
        """Draft up to ``num_tokens`` tokens for every sequence of the batch.

        Returns None if that failed and the engine can go on: a draft writes nothing that verification
        reads, so a step without drafts is as good as any other.
        """
        observer = self.observer
        instead = None if observer is None else observer.round_started(batch, num_tokens, sample)
        if instead is not None:
            return instead
        drafted = self.guarded(lambda: self._draft(batch, num_tokens, sample))
        if drafted is None and self.controller is not None:
            self.controller.round_failed()
        if observer is not None:
            observer.round_ended(batch, drafted)
        return None if drafted is None else drafted.output

    def guarded(self, work: Callable[[], Result]) -> Result | None:
        """Do a part of drafting; None if that failed and the engine can go on.

        What fails before anything is served, as in the engine's warm-up, would fail ever after: it ends the
        start.
        """
        try:
            return work()
        except Exception as error:
            if self._on_failure is None or not self._serving:
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
        if self.observer is not None:
            self.observer.verified(request_ids, lengths, rejected)
        controller = self.controller
        if controller is not None:
            self.guarded(lambda: controller.observe(request_ids, lengths, rejected))

    def may_idle(self, request_ids: Sequence[str]) -> bool:
        """Whether ``idles`` could be true of these requests. Changes nothing."""
        return self.controller is not None and self.controller.may_idle(request_ids)

    def idles(self, request_ids: Sequence[str]) -> bool:
        """Whether nothing is to be drafted or learnt after a step of these requests, all decoding.

        Then ``draft`` is not called, nor ``observe`` unless the step verified drafts.
        """
        idles = self.controller is not None and self.controller.idles(request_ids)
        self.statistics.total.plain_steps += idles
        return idles

    def read(self, prompts: PromptTokens) -> None:
        """Tell who chooses the layers of prompts, where ``policy.reads_prompts``."""
        if prompts:
            self.guarded(lambda: self.policy.read(prompts))

    def _draft(self, batch: SequenceBatch, num_tokens: int, sample: Sample) -> DraftRound:
        rows, device = len(batch), batch.tokens.device
        sampling = np.zeros(rows, dtype=bool) if batch.sampling is None else batch.sampling
        slots, started = self._slots(batch.request_ids, sampling)
        self.policy.apply()
        choice, match_lengths = Choice(len(self.options.budgets) - 1, num_tokens), None
        if self.controller is not None:
            masks = self.sequences.masks
            self.controller.rank_sync.exchange(self.controller.gate, self._share, device)
            if batch.ngrams is not None:
                match_lengths = self.controller.ngram_lengths.predict(slots, started, batch.ngrams.lengths)
            context, version = batch.max_lengths.numpy(), self.sequences.version
            due = partial(self.policy.passes_due, slots)
            choice = self.controller.choose(slots, masks, num_tokens, match_lengths, context, version, due)
        drafted = torch.zeros(rows, num_tokens, dtype=torch.int64, device=device)
        lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        drawn, looked_up = np.full((rows, num_tokens), -1), np.zeros(rows, dtype=bool)
        if choice.ngram and batch.ngrams is not None and match_lengths is not None:
            looked_up = match_lengths > 0
            self.statistics.total.ngrams += int(looked_up.sum())
            at = to_device(np.flatnonzero(looked_up), device)
            drafted[at, : choice.ngram] = batch.ngrams.tokens[at, : choice.ngram]
            lengths[at] = to_device(np.minimum(match_lengths[looked_up], choice.ngram), device)
        skipping = np.flatnonzero(~looked_up) if choice.length else np.empty(0, dtype=np.int64)
        skip_drafts = None
        if skipping.size:
            skip_drafts = self._draft_by_skipping(
                batch.select(skipping),
                slots[skipping],
                rows,
                choice,
                lambda hidden, positions, step, of, exact=None: sample(
                    hidden, positions, step, skipping[of], exact
                ),
            )
            on_device, width = rows_index(skipping, rows, device), skip_drafts.draft.tokens.shape[1]
            drafted[on_device, :width] = skip_drafts.draft.tokens
            lengths[on_device] = skip_drafts.draft.lengths
            drawn[skipping, :width] = skip_drafts.draft.drawn
        self.statistics.total.plain_steps += not choice.length and not choice.ngram
        output = DraftOutput(drafted, lengths, drawn)
        done = DraftRound(slots, choice, looked_up, skipping, skip_drafts, output)
        if self.controller is not None:
            self._remember(batch, done, self.controller)
        return done

    def _remember(self, batch: SequenceBatch, done: DraftRound, controller: Controller) -> None:
        """Tell the controller of a round."""
        rows, lengths, running = len(batch), done.output.lengths, batch.running or batch.request_ids
        skipping, skip_drafts = done.skipping, done.skip_drafts
        if skip_drafts is None and not done.looked_up.any():
            controller.round_ended(running, None, DeviceEvent(lengths.device))
            return
        certain, limits, sure = np.zeros(rows, dtype=bool), np.zeros(rows, dtype=np.int64), None
        drafted = None
        ended = DeviceEvent(lengths.device)
        if skip_drafts is not None:
            certain[skipping[skip_drafts.due]] = True
            limits[skipping] = done.choice.length
            if not self.drop_stopped:
                drafted = np.zeros(rows, dtype=np.int64)
                drafted[skipping] = skip_drafts.draft.count
            if skip_drafts.draft.confidence is not None:
                sure = skip_drafts.draft.confidence.new_zeros(rows, skip_drafts.draft.confidence.shape[1])
                sure[rows_index(skipping, rows, lengths.device)] = skip_drafts.draft.confidence
            controller.time_drafting(rows, skip_drafts.events, self._predicted, skip_drafts.due.size)
            ended = skip_drafts.events[-1]
        ids, slots, looked_up, choice = batch.request_ids, done.slots, done.looked_up, done.choice
        drafts = UnverifiedDrafts(ids, slots, looked_up, certain, lengths, drafted, limits, sure, choice)
        controller.round_ended(running, drafts, ended)

    def _draft_by_skipping(
        self,
        batch: SequenceBatch,
        slots: np.ndarray,
        running: int,
        choice: Choice,
        sample: Sample,
    ) -> LayerSkipDraft:
        """Draft for the rows with layers left out, after new choices of these where they are due.

        ``running``: sequences of the round, whatever is drafted for them.
        """
        rows, device = len(batch), batch.tokens.device
        started = DeviceEvent(device)
        due = self.policy.due(slots, *self._passes(choice, running))
        exact = self.policy.optimize(batch.select(due), slots[due], choice) if due.size else None
        optimized = DeviceEvent(device)
        if self._plans is None:
            self._plans = Plans(self.sequences, self.options.contexts, device)
        rule = self._exit(slots, choice, device)
        draft = DraftTokenBuffer(rows, choice.length, rule, self.drop_stopped, device, batch.stop_tokens)
        self._predicted = 0.0
        draft_steps = sampled = 0
        for step in range(choice.length):
            left = draft.left
            if left.size == 0:
                break
            if step:
                on = draft.following(batch)
                hidden = self._draft_step(on, self._plans.plan(slots[left], choice))
            else:
                on, hidden = batch, self._first_hidden(batch, slots, due, exact, choice)
            of_target = due if due.size and not step else None
            tokens, confidence = sample(hidden, on.positions, step, left, of_target)
            if not step and confidence is not None and due.size and self.options.draft_exit_threshold is None:
                confidence = confidence.index_fill(0, to_device(due, device), 1.0)  # no doubt there
            draft.take(left, tokens, confidence, sampled + np.arange(left.size))
            sampled += left.size
            draft_steps += bool(step) or due.size < rows
        draft.finish()
        self.sequences.advance(slots, due)
        masks = self._plans.masks(slots, choice)
        self.statistics.count_round(masks, draft_steps, due.size)
        if due.size:
            self.statistics.count_pass(started, optimized)
        self.statistics.total.changed = self.sequences.changed
        self.statistics.total.early_exit_tokens += int((choice.length - draft.count).sum())
        return LayerSkipDraft(draft, due, masks, (started, optimized, DeviceEvent(device)))

    def _exit(self, slots: np.ndarray, choice: Choice, device: torch.device) -> Exit | None:
        """When to stop drafting for the sequences of a round; None: never early."""
        threshold = self.options.draft_exit_threshold
        if threshold is None:
            return None if self.controller is None else self.controller.exit(slots, choice, device)
        return FixedExit(threshold) if threshold else None

    @property
    def asks_confidence(self) -> bool:
        """Whether ``sample`` has to say how sure the draft is."""
        threshold = self.options.draft_exit_threshold
        return self._make_controller is not None if threshold is None else threshold > 0

    def _slots(self, request_ids: Sequence[str], sampling: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """[rows] int64, and those of them that are new."""
        slots = self.sequences.slots(request_ids)
        started = self.sequences.take_started()
        if self.controller is not None:
            for row in np.flatnonzero(np.isin(slots, started)):
                self.controller.evidence.start(slots[row], bool(sampling[row]))
        return slots, started

    def _passes(self, choice: Choice, running: int) -> tuple[int, int]:
        """Rounds between two choices of a sequence's layers, and for how many they may be made now."""
        if self.controller is None:
            return self.options.optimization_interval, running
        return self.controller.rounds_between_passes(choice, running), self.controller.passes.most

    def _first_hidden(
        self, batch: SequenceBatch, slots: np.ndarray, due: np.ndarray, exact: Tensor | None, choice: Choice
    ) -> Tensor:
        """[rows, hidden_size]: the target's states where optimised, the draft's elsewhere."""
        assert self._plans is not None
        if exact is None:
            return self._draft_step(batch, self._plans.plan(slots, choice))
        hidden = exact.new_empty(len(batch), exact.shape[1])
        hidden[to_device(due, exact.device)] = exact
        rest = np.setdiff1d(np.arange(len(batch)), due)
        if rest.size:
            plan = self._plans.plan(slots[rest], choice)
            hidden[to_device(rest, exact.device)] = self._draft_step(batch.select(rest), plan)
        return hidden

    def _draft_step(self, batch: SequenceBatch, plan: Plan) -> Tensor:
        """One forward pass of the draft: [rows, hidden_size]."""
        self.statistics.total.sublayers += len(plan.steps)
        if self.controller is not None:
            self._predicted += self.controller.draft_seconds(len(batch), [part for _, part, _ in plan.steps])
        return self.passes.draft_step(batch, plan)

    def forget(self) -> None:
        """Know of no requests, as after the start."""
        self.sequences.reset()
        self.policy.reset()
        if self.controller is not None:
            self.controller.reset()

    @torch.inference_mode()
    def start(self, device: torch.device, steps: Mapping[int, Callable[[], None]] | None = None) -> None:
        """Before anything is served: forget the engine's warm-up, and find out what passes cost.

        ``steps``: the engine's own steps by their tokens, where they are not passes like those of drafts.
        """
        self.forget()
        self.statistics = DraftStatistics(self.decoder.num_layers)
        # Without a scratch block the cache is so small that it is refused next.
        if self._make_controller is not None and self.passes.attention.scratch_block >= 1:
            costs = self._measure(device, steps or {})
            self.controller = self.policy.controller = self._make_controller(costs)
        self._serving = True

    def _measure(self, device: torch.device, steps: Mapping[int, Callable[[], None]]) -> PassCosts:
        """What passes and the engine's own steps cost, as rank 0 finds it."""
        costs = self.passes.measure(device)
        kinds = ("", "draft_", "pass_")
        names = [kind + of for kind in kinds for of in ("layer", "fixed") if getattr(costs, kind + of)]
        shared = self._share(torch.tensor([getattr(costs, n) for n in names], device=device)).tolist()
        values: dict[str, Any] = dict(zip(names, map(tuple, shared), strict=True))
        if costs.context:
            reading = torch.tensor([costs.context, costs.context_query], device=device)
            values["context"], values["context_query"] = map(tuple, self._share(reading).tolist())
        costs = replace(costs, **values)
        if steps:
            step = tuple(self._share(torch.tensor(measure_steps(steps, device), device=device)).tolist())
            costs = replace(costs, step_rows=tuple(map(float, steps)), step=step)
        return costs
