"""The controller of a drafter: its evidence, what passes have been seen to cost, and what it chose."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from clasp_vllm.control.acceptance import AcceptanceEvidence
from clasp_vllm.control.costs import SIZES, Array, CostCorrections, LayerShares, PassCosts
from clasp_vllm.control.early_exit import Confidence, SurvivalExit
from clasp_vllm.control.loss_budget import START, LossBudget
from clasp_vllm.control.ngram_lengths import NgramLengthPredictor
from clasp_vllm.control.planner import (
    WORTH_IT,
    Batch,
    Choice,
    Ngrams,
    choose,
    draft_lengths,
    rounds_between_passes,
)
from clasp_vllm.control.probes import Probes
from clasp_vllm.control.verification import UnverifiedDrafts, VerificationOutcomes
from clasp_vllm.device import DeviceEvent, HostCopy, to_device

MAX_BATCHES = 256  # sets of sequences, of which what draft steps run is kept
PLAIN_EVERY = 128  # rounds of a batch's size, one goes without drafts, to know what it costs;
PLAIN_FIRST = 8  # the first of them comes sooner
OFF_CHECK = 32  # steps without speculation until the next decision,
OFF_CHANGE = 0.25  # unless the number of rows has changed by this share, or as many are new
SKIPPING_EVERY = 8  # rounds with prompt-lookup matches, after which drafts by skipping are priced anew
PATIENCE = 6  # steps that a probe waits for room
# Standard deviations added to the batch's mean acceptance before drafts are given up: that drafts do not pay
# shows in a few rounds, that they would pay only in rare probes.
OPTIMISM_SIGMAS = 0.5
MASKS_TO_SHARE = 2  # rows from which on
SHARE_EVERY = 16  # rounds, that ranks take rank 0's corrections


class Controller:
    """Chooses the budget, the draft length, shared masks and how often to optimise, each round."""

    def __init__(
        self,
        capacity: int,
        budgets: Sequence[int],
        num_layers: int,
        shares: LayerShares,
        longest: int,
        interval: int | None,
        open_choices: Collection[str],
        padded: bool,
        drop_stopped: bool,
        ranks: int,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        """
        Args:
            capacity: sequences, by the slots of the ``SequenceTable``.
            budgets: layers to skip, those to choose from, ascending.
            num_layers: of the target.
            shares: of attention and MLP in what a layer costs.
            longest: draft tokens at most.
            interval: rounds between two passes for a sequence, where that is fixed.
            open_choices: what is to be chosen, of length, sharing and speculation. Else drafts are as long as
                allowed, masks each sequence's own, and speculation is always on.
            padded: whether drafts that stop early are verified in full length all the same.
            drop_stopped: whether rows that stop early leave the batch of the draft.
            ranks: that run the layers together. They must choose alike, so with more than one
                corrections of costs are those that rank 0 shares now and then.
            log: told in words whenever another choice is made.
        """
        self.corrections = CostCorrections()
        self.costs: PassCosts | None = None  # as measured at start-up
        # Draft tokens that the next round should have room for. Where the scheduler makes room ahead of time
        # (``padded``) it has to be told.
        self.requested_draft_length = longest
        self.padded = padded
        self._drop_stopped = drop_stopped
        self._sent: int | None = None
        self.longest = longest
        self._log = log
        self._logged: tuple[object, ...] = ()
        self._shares = ranks > 1
        self._sharing: HostCopy | None = None
        self._rounds = 0
        self._scales = self.corrections.scales  # those to decide by
        if self._shares:
            self._scales = {name: scale.copy() for name, scale in self._scales.items()}
        self._until_plain = np.full(len(SIZES), PLAIN_FIRST)  # rounds
        self._budgets = budgets
        self._layer_shares = shares
        self._num_layers = num_layers
        self._interval = interval
        self._open = frozenset(open_choices)
        self._lengths = [longest]
        if "length" in open_choices:
            lengths = draft_lengths(longest) if padded else range(longest + 1)
            self._lengths = [length for length in lengths if length]
        self._running: frozenset[str] = frozenset()  # the requests of the last round
        self._layers: dict[bytes, Array] = {}
        self._layers_version: int | None = None
        self._ended: DeviceEvent | None = None  # the last round
        self._device: torch.device | None = None
        # The engine's step if it verified drafts: tokens, seconds expected, start.
        self._step: tuple[int, float, DeviceEvent] | None = None
        self._capacity = capacity
        self.reset()

    def reset(self) -> None:
        """Know of no requests, as after the start. What passes cost is the machine's, and kept."""
        self.evidence = AcceptanceEvidence(self._capacity, self._budgets, self._num_layers, self.longest)
        self.confidence = Confidence()
        self.outcomes = VerificationOutcomes(self.evidence, self.confidence, self.longest)
        self.ngram_lengths = NgramLengthPredictor(self._capacity, late=self.padded)
        self.last: Choice | None = None
        # By optimism: of what slots, the best drafts by skipping, and for how many rounds.
        self._skipping: dict[float, tuple[bytes, Choice, int]] = {}
        self._probes = Probes()
        self._probing = 0  # steps since a probe was decided on and room for it was asked for
        self._off_rows, self._off_started, self._off_steps = 0, 0, 0
        self._idle, self._idled = 0, 0  # steps that may be left out yet, and those that were
        self._idle_ids: list[str] = []
        self._optimistic = False  # that the last choice is better than thought
        self.budget = LossBudget()
        self._shared_balance: float | None = START if self._shares else None  # of rank 0
        # Rows, of a verification the tokens it ran and how many were rejected, its start and end.
        self._gains: list[tuple[int, tuple[int, HostCopy] | None, DeviceEvent, DeviceEvent]] = []
        self._made = 0, 0, HostCopy(torch.zeros(1))

    def observe(self, request_ids: Sequence[str], lengths: np.ndarray, rejected: Tensor | None) -> None:
        """Take in the engine's step: see ``Drafter.observe``."""
        self.outcomes.verified(request_ids, lengths - 1, rejected)
        self.corrections.settle()
        self._settle()
        self.budget.step()
        assert self.costs is not None
        # Steps with prefill are of another kind, and between batches the engine may have waited.
        ended, self._ended, self._step = self._ended, None, None
        if ended is not None and self._running.issuperset(request_ids):
            tokens = int(lengths.sum())
            predicted = float(self.costs.engine_step(tokens, self._num_layers))
            if tokens == len(lengths):
                self.corrections.add("plain_scale", tokens, predicted, ended, DeviceEvent(ended.device))
            else:
                self._step = tokens, predicted, ended
                assert rejected is not None
                self._made = len(lengths), tokens, HostCopy(rejected.sum())

    def may_idle(self, request_ids: Sequence[str]) -> bool:
        """Whether speculation is off for some steps yet, and the batch the same."""
        return bool(self._idle) and self._idle_ids == request_ids

    def idles(self, request_ids: Sequence[str]) -> bool:
        """Whether nothing is to be done after a plain step, for speculation is off and the batch the same.

        Such a step is counted, and costs next to nothing. The last of them is timed by the one that follows.
        """
        if not self.may_idle(request_ids):
            return False
        self._idle -= 1
        self._idled += 1
        self._off_steps += 1
        self.budget.step()
        assert self._device is not None
        self._ended = None if self._idle else DeviceEvent(self._device)
        return True

    def forward_seconds(self, rows: int, layers: float) -> float:
        """Of a forward pass, without correction."""
        assert self.costs is not None
        return float(self.costs.forward(rows, layers))

    def draft_seconds(self, rows: int, parts: Sequence[int]) -> float:
        """Of a draft step, without correction. ``parts``: as in ``LayerShares.cost``."""
        return self.forward_seconds(rows, self._layer_shares.cost(parts))

    def drafted(
        self, request_ids: Sequence[str], drafts: UnverifiedDrafts | None, ended: DeviceEvent
    ) -> None:
        """A round has ended: remember its drafts, if there are any, until they are verified."""
        if drafts is not None:
            self.outcomes.drafted(drafts)
        self.evidence.forget(1 + self._idled)
        self._idled = 0
        self._running, self._ended, self._device = frozenset(request_ids), ended, ended.device
        self._idle_ids = list(request_ids)

    def _settle(self) -> None:
        """Keep account of what the device has finished."""
        assert self.costs is not None
        costs = self.costs.scaled(self._scales)
        while self._gains and self._gains[0][-1].reached():
            rows, made, started, ended = self._gains.pop(0)
            seconds, plain = ended.seconds_since(started), float(costs.plain(rows, self._num_layers))
            if made is None:
                self.budget.drafted(seconds, plain)
            else:
                tokens, rejected = made
                self.budget.verified(rows, tokens - int(rejected.get()), seconds, plain)

    def timed(
        self, rows: int, marks: tuple[DeviceEvent, DeviceEvent, DeviceEvent], predicted: float, optimized: int
    ) -> None:
        """Compare what drafting by skipping took with the costs.

        Args:
            rows: of the batch.
            marks: its start, the end of its optimisation pass, and its end.
            predicted: seconds of the draft steps.
            optimized: rows of the pass; 0 = there was none.
        """
        self._gains.append((rows, None, marks[0], marks[2]))
        if predicted:
            self.corrections.add("draft_scale", 1, predicted, *marks[1:])
        if optimized:
            assert self.costs is not None
            seconds = self.costs.optimize(optimized, self._num_layers, self._budgets[-1])
            self.corrections.add("pass_scale", 1, seconds, *marks[:2])

    def choose(
        self,
        slots: np.ndarray,
        masks: Tensor,
        shared_mask: Tensor,
        allowed: int,
        match_lengths: np.ndarray | None = None,
        version: int | None = None,
    ) -> Choice:
        """What to do in this round; of no length where plain decoding is better.

        Args:
            slots: [rows] int64.
            masks: [capacity, budgets, num_layers, 2] bool, each sequence's own.
            shared_mask: [budgets, num_layers, 2] bool.
            allowed: draft tokens that there is room for in this round.
            match_lengths: [rows] int64, of prompt-lookup matches, if they have been looked up.
            version: another one whenever a mask has changed.
        """
        assert self.costs is not None
        self._idle = 0
        rows = len(slots)
        costs = self.costs.scaled(self._scales)
        match_lengths = np.zeros(rows, dtype=np.int64) if match_lengths is None else match_lengths
        choice = self.last
        if choice is None or self._is_due(rows) or self._ngrams_pay(costs, slots, match_lengths):
            if version is None or version != self._layers_version or len(self._layers) >= MAX_BATCHES:
                self._layers.clear()
                self._layers_version = version
            choice = self.last = self._best(costs, slots, masks, shared_mask, match_lengths)
            self._optimistic = choice.ratio < WORTH_IT and "speculation" in self._open
            if self._optimistic:
                optimistic = self._best(
                    costs, slots, masks, shared_mask, match_lengths, OPTIMISM_SIGMAS / rows**0.5
                )
                self._optimistic = optimistic.ratio >= WORTH_IT
        plain = float(costs.plain(rows, self._num_layers))
        worth_it = choice.ratio >= WORTH_IT or self._optimistic
        worth_it = (worth_it and self._affords(choice, plain)) or "speculation" not in self._open
        ask = worth_it
        if worth_it:
            self._probing = 0
        elif self._probing:
            self._probing = (self._probing + 1) % PATIENCE
        elif self._probes.due(choice, plain, 1 + self._idled):
            self._probing, ask = 1, True
        self.requested_draft_length = max(choice.length, choice.ngram) if ask else 0
        self._explain(choice, costs, slots, worth_it)
        goes_plain = self._goes_plain(rows, bool(allowed) and worth_it)
        if self._step is not None:  # what precedes drafting is part of what drafts cost
            tokens, predicted, started = self._step
            self._step = None
            ended = DeviceEvent(started.device)
            self.corrections.add("verify_scale", tokens, predicted, started, ended)
            self._gains.append((self._made[0], self._made[1:], started, ended))
        if goes_plain:
            self.requested_draft_length = 0
            if not self.padded:
                return replace(choice, length=0, ngram=0)
        if allowed and (worth_it or self._probing):
            self._off_rows = self._off_steps = self._probing = 0
            return replace(choice, length=min(choice.length, allowed), ngram=min(choice.ngram, allowed))
        self._off_steps += 1
        if not self.requested_draft_length:
            self._idle = -self._off_steps % OFF_CHECK
        return replace(choice, length=0, ngram=0)

    def _affords(self, choice: Choice, plain_seconds: float) -> bool:
        balance = self.budget.balance if self._shared_balance is None else self._shared_balance
        return balance >= choice.seconds / plain_seconds - 1

    def _goes_plain(self, rows: int, speculating: bool) -> bool:
        """Whether to do without drafts once, though they pay, to learn what that costs."""
        size = int(np.abs(np.array(SIZES) - rows).argmin())
        self._until_plain[size] -= 1
        due = bool(self._until_plain[size] <= 0)
        if due or not speculating:
            self._until_plain[size] = PLAIN_EVERY
        return due and speculating and "speculation" in self._open

    def _is_due(self, rows: int) -> bool:
        """Whether a new decision is due: always while speculating, now and then while off."""
        similar = self._off_rows * (1 - OFF_CHANGE) <= rows <= self._off_rows * (1 + OFF_CHANGE)
        similar &= self.evidence.started - self._off_started <= rows * OFF_CHANGE
        if self._off_steps % OFF_CHECK and similar:
            return False
        self._off_rows, self._off_started = rows, self.evidence.started
        return True

    def _ngrams_pay(self, costs: PassCosts, slots: np.ndarray, match_lengths: np.ndarray) -> bool:
        """Whether prompt-lookup matches may pay although speculation is off."""
        looked_up = np.flatnonzero(match_lengths)
        if not looked_up.size:
            return False
        ngrams = Ngrams(self.evidence.ngram_acceptance(slots[looked_up]), match_lengths[looked_up])
        others = len(slots) - looked_up.size
        return ngrams.best(costs, self._num_layers, others, self.longest, self.padded).ratio >= WORTH_IT

    def _explain(self, choice: Choice, costs: PassCosts, slots: np.ndarray, worth_it: bool) -> None:
        plan = choice.budget, choice.length, choice.shared, choice.ngram
        made = len(slots), *plan, worth_it, self._optimistic, self._probing
        if made == self._logged:
            return
        self._logged = made
        acceptance = self.evidence.acceptance(slots)[int(choice.shared), :, choice.budget].mean(0)
        skipped = self._budgets[choice.budget]
        plain = 1000 * float(costs.plain(len(slots), self._num_layers))
        step = 1000 * float(costs.draft(len(slots), self._num_layers - skipped))
        what = "speculating" if worth_it else "probing" if self._probing else "off"
        if self._optimistic:
            what = "trying"
        self._log(
            f"{len(slots)} sequences: {what}; "
            f"best: {choice.length} tokens with {skipped:g} of {self._num_layers} layers skipped"
            f"{' by all alike' if choice.shared else ''}, {choice.ngram} from the context, "
            f"stopping when the chance of all falls under {choice.floor:.2f}, "
            f"expected {choice.ratio:.2f} times plain decoding (acceptance "
            f"{' '.join(f'{chance:.2f}' for chance in acceptance)}, "
            f"a plain step {plain:.1f} ms, a draft step {step:.1f} ms)"
        )

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
        on = self.requested_draft_length > 0
        return {
            "draft_length": float(self.last.length if on else 0),
            "skipped_layers": self._budgets[self.last.budget],
            "expected_ratio": self.last.ratio,
        }

    def _best(
        self,
        costs: PassCosts,
        slots: np.ndarray,
        masks: Tensor,
        shared_mask: Tensor,
        match_lengths: np.ndarray,
        optimism: float = 0.0,
    ) -> Choice:
        """The best way to speculate, with prompt-lookup matches where they are better than drafting."""

        def batch(rows: np.ndarray) -> Batch:
            layers = self._layers.get(slots[rows].tobytes())
            if layers is None:  # worked out once for each set of sequences, until a mask changes
                own = masks[torch.from_numpy(slots[rows])].all(0)
                layers = self._layer_shares.layers_run(torch.stack((own, shared_mask))).numpy()
                self._layers[slots[rows].tobytes()] = layers
            kinds = 2 if "sharing" in self._open and len(rows) >= MASKS_TO_SHARE else 1
            return Batch(
                costs,
                self._num_layers,
                self.evidence.acceptance(slots[rows], optimism)[:kinds],
                layers[:kinds],
                self.evidence.continuation_prob,
                self._lengths,
                self.padded,
                self._drop_stopped,
            )

        looked_up = np.flatnonzero(match_lengths)
        if not looked_up.size:
            return choose(batch(np.arange(len(slots))))
        ngrams = Ngrams(self.evidence.ngram_acceptance(slots[looked_up]), match_lengths[looked_up])
        # How good drafts by skipping are changes slowly, and to work it out costs more than a lookup.
        known, skipping, age = self._skipping.get(optimism, (b"", None, 0))
        if skipping is None or known != slots.tobytes() or age == SKIPPING_EVERY:
            skipping, age = choose(batch(np.arange(len(slots)))), 0
        self._skipping[optimism] = slots.tobytes(), skipping, age + 1
        if looked_up.size == len(slots) and not self.padded:
            taken = ngrams.best(costs, self._num_layers, 0, self.longest, padded=False)
        else:
            taken = choose(batch(np.flatnonzero(match_lengths == 0)), ngrams)
        return max(skipping, taken, key=lambda choice: choice.ratio)

    def exit(self, slots: np.ndarray, choice: Choice, device: torch.device) -> SurvivalExit:
        """When to stop drafting for the sequences of a round."""
        return self.confidence.exit(self.evidence.kind[slots], choice.floor, device)

    def rounds_between_passes(self, choice: Choice, rows: int) -> int:
        """How often a sequence's layers are chosen anew."""
        if self._interval is not None:
            return self._interval
        assert self.costs is not None
        costs = self.costs.scaled(self._scales)
        kept = self._num_layers - self._budgets[choice.budget]
        return rounds_between_passes(costs, self._num_layers, self._budgets[-1], choice, rows, kept)

    def findings(self, agree: Tensor) -> Tensor:
        """What an optimisation pass found, to share: a float32 vector.

        ``agree``: [rows, budgets] bool, the budget's state predicts the full model's token.
        """
        return agree.float().flatten()

    def learn(self, findings: np.ndarray) -> None:
        """Take in what a pass found, as shared by rank 0."""
        self.evidence.add_pass(findings.reshape(-1, len(self._budgets)) > 0.5)

    def share_scales(self, share: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Now and then take rank 0's corrections of costs and its account. All ranks call it each round."""
        if not self._shares:
            return
        shared, self._sharing = self._sharing, None
        if shared is not None:
            ends = np.cumsum([len(scale) for scale in self._scales.values()])
            *scales, balance = np.split(shared.get().numpy(), ends)
            self._scales = dict(zip(self._scales, scales, strict=True))
            self._shared_balance = float(balance[0])
        if self._rounds % SHARE_EVERY == 0:
            own = *self.corrections.scales.values(), np.array([self.budget.balance])
            values = np.concatenate(own).astype(np.float32)
            self._sharing = HostCopy(share(to_device(values, device)))
        self._rounds += 1
