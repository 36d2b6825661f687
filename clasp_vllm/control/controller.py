"""The controller of a drafter: each round it takes the way to speculate that promises most, or none.

Its parts have one job each: ``acceptance`` and ``early_exit`` what is accepted, ``costs`` and ``round_times``
what it costs, ``pricing`` and ``planner`` the best way, ``gate`` whether at all, and ``rank_sync`` sees to it
that all ranks decide alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from clasp_vllm.control.acceptance import AcceptanceEvidence
from clasp_vllm.control.choice_log import ChoiceLog
from clasp_vllm.control.costs import SIZES, CostCorrections, LayerShares, PassCosts
from clasp_vllm.control.early_exit import Confidence, SurvivalExit
from clasp_vllm.control.gate import Gate
from clasp_vllm.control.ngram_lengths import NgramLengthPredictor
from clasp_vllm.control.pass_schedule import PassSchedule
from clasp_vllm.control.planner import WORTH_IT, Choice
from clasp_vllm.control.pricing import Pricing, Sequences
from clasp_vllm.control.rank_sync import RankSync
from clasp_vllm.control.round_times import RoundTimes
from clasp_vllm.control.verification import UnverifiedDrafts, VerificationOutcomes
from clasp_vllm.device import DeviceEvent

PLAIN_EVERY = 128  # rounds of a batch's size, one goes without drafts, to know what it costs;
PLAIN_FIRST = 2  # the first of them comes sooner, and each of the next after twice as many
# Standard deviations added to the batch's mean acceptance before drafts are given up: that drafts do not pay
# shows in a few rounds, that they would pay only in rare probes.
OPTIMISM_SIGMAS = 0.5


class Controller:
    """Chooses the budget, the draft length and how often to optimise, each round.

    Attributes:
        requested_draft_length: tokens that the next round should have room for. Where the scheduler makes
            room ahead of time (``padded``) it has to be told.
        last: the last choice, whatever was done; None: there was none.
        passes: when sequences' layers are chosen again.
    """

    def __init__(  # noqa: PLR0913 - what holds from the start on
        self,
        costs: PassCosts,
        capacity: int,
        budgets: Sequence[int],
        contexts: Sequence[int | None],
        num_layers: int,
        shares: LayerShares,
        longest: int,
        interval: int | None,
        open_choices: Collection[str],
        padded: bool,
        drop_stopped: bool,
        ranks: int,
        log: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            costs: of forward passes, as measured at start-up.
            capacity: sequences, by the slots of the ``SequenceTable``.
            budgets: layers to skip, those to choose from, ascending.
            contexts: tokens that drafts may attend to at most, descending; None: all.
            num_layers: of the target.
            shares: of attention and MLP in what a layer costs.
            longest: draft tokens at most.
            interval: rounds between two passes for a sequence, where that is fixed.
            open_choices: what is to be chosen, of length and speculation. Else drafts are as long as
                allowed, and speculation is always on.
            padded: whether drafts that stop early are verified in full length all the same.
            drop_stopped: whether rows that stop early leave the batch of the draft.
            ranks: that run the layers together. They must choose alike, so with more than one
                corrections of costs are those that rank 0 shares now and then.
            log: told in words whenever another choice is made; None: nobody is.
        """
        self.costs = costs
        self.corrections = CostCorrections(len(contexts))
        self.requested_draft_length = longest
        self.padded = padded
        self.longest = longest
        self._sent: int | None = None
        self._log = None if log is None else ChoiceLog(log, num_layers)
        self._ranks = ranks
        self._until_plain, self._plain_gap = np.full((2, len(SIZES)), PLAIN_FIRST)  # rounds
        self._budgets = budgets
        self._contexts = contexts
        self._num_layers = num_layers
        self._layer_shares = shares
        self._interval = interval
        self._may_stop = "speculation" in open_choices
        self._capacity = capacity
        self.pricing = Pricing(contexts, num_layers, shares, longest, open_choices, padded, drop_stopped)
        self.rank_sync = RankSync(self.corrections, ranks)
        self.reset()

    def reset(self) -> None:
        """Know of no requests, as after the start. What passes cost is the machine's, and kept."""
        windows = [window for window in self._contexts[1:] if window is not None]
        self.evidence = AcceptanceEvidence(
            self._capacity, self._budgets, self._num_layers, self.longest, windows
        )
        self._lengths = np.empty(0, dtype=np.int64)  # tokens of context, of the last round
        self._current = self.costs  # of that round, with corrections
        self._draft_costs: PassCosts | None = None  # of its drafts, without
        self.confidence = Confidence()
        self.outcomes = VerificationOutcomes(self.evidence, self.confidence, self.longest)
        self.ngram_lengths = NgramLengthPredictor(self._capacity, late=self.padded)
        self.gate = Gate(not self._may_stop, shared=self._ranks > 1)
        self.last: Choice | None = None
        self._decided: Choice | None = None  # of ways to draft by skipping
        self._charged = Choice(0, 0)  # the same with the optimisation passes that are due
        self.passes = PassSchedule(self._interval, self._num_layers, self._budgets[-1], self._capacity)
        self._optimistic = False  # whether optimism alone makes it worth trying
        self.pricing.reset()
        self._times = RoundTimes(self._num_layers, self.corrections)
        self._request_ids: list[str] = []  # of the last round

    def observe(self, request_ids: Sequence[str], lengths: np.ndarray, rejected: Tensor | None) -> None:
        """Take in the engine's step: see ``Drafter.observe``."""
        self.outcomes.verified(request_ids, lengths - 1, rejected)
        self._times.settle(self._current, self.gate.budget, self.gate.match_budget)
        self._times.engine_step(request_ids, lengths, rejected, self.costs.over(self._lengths))

    def may_idle(self, request_ids: Sequence[str]) -> bool:
        """Whether speculation is off for some steps yet, and the batch the same."""
        return self.gate.may_idle and self._request_ids == request_ids

    def idles(self, request_ids: Sequence[str]) -> bool:
        """Whether nothing is to be done after a step, for speculation is off and the batch the same.

        Such a step is counted, and costs next to nothing.
        """
        if not self.may_idle(request_ids):
            return False
        self.gate.idle()
        self._times.verified()
        self._times.idled(last=not self.gate.may_idle)
        return True

    def draft_seconds(self, rows: int, parts: Sequence[int]) -> float:
        """Of a draft step, without correction. ``parts``: as in ``LayerShares.cost``."""
        if self._draft_costs is None:
            self._draft_costs = self._drafting(self.costs, self.last)
        return float(self._draft_costs.draft_step(rows, self._layer_shares.cost(parts)))

    def round_ended(
        self, request_ids: Sequence[str], drafts: UnverifiedDrafts | None, ended: DeviceEvent
    ) -> None:
        """A round has ended: remember its drafts, if there are any, until they are verified."""
        if drafts is not None:
            window = self._window(drafts.choice)
            cut = None if window is None else self._lengths > window
            self.outcomes.remember(replace(drafts, cut=cut))
        self.evidence.forget(1 + self.gate.take_idled())
        self._times.round_ended(request_ids, ended, drafts is not None and not drafts.choice.length)
        self._request_ids = list(request_ids)

    def round_failed(self) -> None:
        """A round has failed: what fails once may fail each time, so the next is tried after a while."""
        self.gate.use_up()

    def time_drafting(
        self,
        rows: int,
        events: tuple[DeviceEvent, DeviceEvent, DeviceEvent],
        predicted: float,
        optimized: int,
    ) -> None:
        """Compare what drafting by skipping took with the costs.

        Args:
            rows: of the batch.
            events: its start, the end of its optimisation pass, and its end.
            predicted: seconds of the draft steps.
            optimized: rows of the pass; 0 = there was none.
        """
        seconds = 0.0
        if optimized:
            costs = self._drafting(self.costs, self.last)
            seconds = costs.optimize(optimized, self._num_layers, self._budgets[-1])
        self._times.add_drafting(rows, events, predicted, seconds, _context(self.last))

    def choose(
        self,
        slots: np.ndarray,
        masks: Tensor,
        allowed: int,
        match_lengths: np.ndarray | None = None,
        lengths: np.ndarray | None = None,
        version: int | None = None,
        due: Callable[[int], tuple[int, bool]] = lambda interval: (0, False),
    ) -> Choice:
        """What to do in this round; of no length where plain decoding is better.

        Args:
            slots: [rows] int64.
            masks: [capacity, budgets, num_layers, 2] bool, each sequence's own.
            allowed: draft tokens that there is room for in this round.
            match_lengths: [rows] int64, of prompt-lookup matches, if they have been looked up.
            lengths: [rows] int, tokens of context, if they are known.
            version: another one whenever a mask has changed.
            due: see ``Policy.passes_due``.
        """
        rows = len(slots)
        match_lengths = np.zeros(rows, dtype=np.int64) if match_lengths is None else match_lengths
        self._lengths = np.zeros(rows, dtype=np.int64) if lengths is None else lengths
        self._draft_costs = None
        costs = self._current = self._corrected()
        plain = float(costs.plain(rows, self._num_layers))
        sequences = Sequences(slots, masks, match_lengths, self._lengths, version)
        decided = self._decide(costs, sequences, plain, due)
        self.gate.decide(self._charged, self._optimistic, plain, rows)
        choice, matches = self._with_matches(decided, costs, sequences, plain)
        self.last = choice
        self.requested_draft_length = max(choice.length, choice.ngram) if self.gate.asks or matches else 0
        self._explain(choice, slots)
        goes_plain = self._goes_plain(rows, bool(allowed), self.gate.speculating or matches)
        self._times.verified()
        if goes_plain:
            self.requested_draft_length, self.gate.asks = 0, False
            if not self.padded:
                return replace(choice, length=0, ngram=0)
        most = allowed if self.gate.opens(allowed) or matches else 0
        return replace(choice, length=min(choice.length, most), ngram=min(choice.ngram, most))

    def _decide(
        self, costs: PassCosts, sequences: Sequences, plain: float, due: Callable[[int], tuple[int, bool]]
    ) -> Choice:
        """The best way to draft by skipping: the last one until a new decision is due."""
        rows, choice = len(sequences.slots), self._decided
        if self.gate.due(rows, self.evidence.started) or choice is None:
            choice = self._decided = self.pricing.best(costs, self.evidence, sequences)
            self._optimistic = False
            if choice.ratio < WORTH_IT and self._may_stop:
                optimism = OPTIMISM_SIGMAS / rows**0.5
                best = self.pricing.best(costs, self.evidence, sequences, optimism)
                self._optimistic = best.ratio >= WORTH_IT
            self._charged = choice
            if choice.length and self._may_stop:
                passes = due(self.passes.interval)
                self._charged = self.passes.with_passes(
                    choice, *passes, costs, lambda some: self.gate.affords(some, plain, rows)
                )
        return choice

    def _with_matches(
        self, choice: Choice, costs: PassCosts, sequences: Sequences, plain: float
    ) -> tuple[Choice, bool]:
        """The choice with prompt-lookup matches, and whether these alone are reason enough to speculate.

        Where drafting by skipping does not pay, matches are taken by themselves, without a new decision.
        """
        if not sequences.match_lengths.any():
            return choice, False
        if self.gate.speculating:
            beside = self.pricing.beside(costs, self.evidence, sequences)
            return (beside if beside.ratio > choice.ratio else choice), False
        best = self.pricing.matches(costs, self.evidence, sequences)
        takes = self.gate.takes_matches(best, plain, len(sequences.slots))
        return (best, True) if takes else (choice, False)

    def _corrected(self) -> PassCosts:
        return self.costs.scaled(self.rank_sync.scales).over(self._lengths)

    def step_seconds(self, rows: int) -> tuple[float, float]:
        """Of a plain step and of a draft step as last chosen, with corrections."""
        costs = self._drafting(self._corrected(), self.last)
        skipped = 0 if self.last is None else self._budgets[self.last.budget]
        draft = costs.draft_step(rows, self._num_layers - skipped)
        return float(costs.plain(rows, self._num_layers)), float(draft)

    def _drafting(self, costs: PassCosts, choice: Choice | None) -> PassCosts:
        """Of the last round's sequences, drafted for as chosen."""
        context = _context(choice)
        return costs.over(self._lengths, self._contexts[context], context)

    def _window(self, choice: Choice | None) -> int | None:
        return self._contexts[_context(choice)]

    def _goes_plain(self, rows: int, room: bool, speculating: bool) -> bool:
        """Whether to do without drafts once, though they pay and there is ``room``, to learn the cost."""
        if not (speculating and room and self._may_stop):
            return False
        size = int(np.abs(np.array(SIZES) - rows).argmin())
        self._until_plain[size] -= 1
        if due := bool(self._until_plain[size] <= 0):
            self._plain_gap[size] = min(2 * self._plain_gap[size], PLAIN_EVERY)
            self._until_plain[size] = self._plain_gap[size]
        return due

    def _explain(self, choice: Choice, slots: np.ndarray) -> None:
        if self._log is None:
            return
        acceptance = self.evidence.acceptance(slots, context=choice.context)[:, choice.budget].mean(0)
        skipped, window = self._budgets[choice.budget], self._window(choice)
        seconds = self.step_seconds(len(slots))
        self._log.say(len(slots), choice, self.gate.state, skipped, window, acceptance, seconds)

    def take_requested_draft_length(self) -> int | None:
        """Draft tokens that the scheduler is to make room for, where that has changed since the last call.

        Drafts that it sees before it makes room for them need no word ahead of time.
        """
        length = self.requested_draft_length if self.padded else self.longest
        if length == self._sent:
            return None
        self._sent = length
        return length

    def gauges(self) -> dict[str, float]:
        """What is chosen now, by the name of its metric."""
        if self.last is None:
            return {}
        return {
            "draft_length": float(self.last.length if self.requested_draft_length else 0),
            "skipped_layers": self._budgets[self.last.budget],
            "draft_context": float(self._window(self.last) or 0),
            "expected_ratio": self.last.ratio,
        }

    def exit(self, slots: np.ndarray, choice: Choice, device: torch.device) -> SurvivalExit:
        """When to stop drafting for the sequences of a round."""
        return self.confidence.exit(self.evidence.kind[slots], choice.floor, device)

    def rounds_between_passes(self, choice: Choice, rows: int) -> int:
        """How often a sequence's layers are chosen again."""
        kept = self._num_layers - self._budgets[choice.budget]
        return self.passes.space_out(self._drafting(self._corrected(), choice), choice, rows, kept)

    def learn(self, agree: np.ndarray, slots: np.ndarray, context: int, lengths: np.ndarray) -> None:
        """Take in what an optimisation pass shows, as shared by rank 0.

        Args:
            agree: [rows, budgets], 1 where the budget's state predicts the target's token.
            slots: [rows] int64.
            context: that the pass attended to, see ``AcceptanceEvidence``.
            lengths: [rows] int, tokens of context.
        """
        window = self._contexts[context]
        self.evidence.add_pass(agree > 0.5, slots, context, None if window is None else lengths > window)


def _context(choice: Choice | None) -> int:
    return 0 if choice is None else choice.context
