"""CLaSp: layers chosen in context, by a dynamic programme on the token that is about to be drafted from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from clasp_vllm.control.planner import Choice
from clasp_vllm.device import Handover, HostCopy, to_device
from clasp_vllm.drafting.batch import SequenceBatch
from clasp_vllm.drafting.passes import Passes
from clasp_vllm.drafting.policy import Policy
from clasp_vllm.drafting.sequences import SequenceTable
from clasp_vllm.policies.evidence import SkipEvidence
from clasp_vllm.skipping.dynamic_program import Programme, backtrack_all

ENOUGH_PASSES = 8  # until the average over all is trusted with new sequences


class Clasp(Policy):
    """Chooses every sequence's layers now and then; on a GPU from the round after the pass."""

    def __init__(
        self,
        sequences: SequenceTable,
        passes: Passes,
        budgets: Sequence[int],
        max_requests: int,
        contexts: Sequence[int | None] = (None,),
        evidence: SkipEvidence | None = None,
        share: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        """
        Args:
            budgets: layers to skip, those to choose from, ascending. The last is the budget M of the
                dynamic programme.
            max_requests: how many sequences may be optimised in one round.
            contexts: windows of context that drafts attend to, see ``DrafterOptions``.
            evidence: of earlier passes, if they are to count.
            share: makes what a pass found the same on all ranks that run the layers together.
        """
        self.evidence = evidence
        self._sequences = sequences
        self._passes = passes
        self._columns = budgets
        self._budgets = torch.tensor(budgets)
        self._max_skipped = budgets[-1]
        self._max_requests = max_requests
        self._contexts = contexts
        self._share = share
        self._handover = Handover()
        # Of the last pass: the requests, their slots, the context and the tokens of it.
        self._passed: tuple[Sequence[str], np.ndarray, int, np.ndarray] | None = None
        # Of the last pass, and of the one before, which has come to the host for certain.
        self._similarities: tuple[HostCopy | None, HostCopy | None] = (None, None)

    def reset(self) -> None:
        """See ``Policy``."""
        self._handover.take()  # what an earlier pass has found is for masks that are gone
        if self.evidence is not None:
            self.evidence.reset()

    def gauges(self) -> dict[str, float]:
        """See ``Policy``."""
        before, last = self._similarities
        known = last if self._budgets.device.type == "cpu" else before
        return {} if known is None else {"similarity": float(known.get())}

    def due(self, slots: np.ndarray, interval: int, limit: int) -> np.ndarray:
        """See ``Policy``."""
        if self.evidence is not None and self.evidence.passes >= ENOUGH_PASSES:
            self._sequences.spread = interval
        return self._sequences.due(slots, interval, min(limit, self._max_requests))

    def passes_due(self, slots: np.ndarray, interval: int) -> tuple[int, bool]:
        """See ``Policy``."""
        due = self.due(slots, interval, len(slots))
        return due.size, not self._sequences.has_own[slots[due]].all()

    def apply(self) -> None:
        """See ``Policy``."""
        ready = self._handover.take()
        if ready is None:
            return
        assert self._passed is not None
        request_ids, slots, context, lengths = self._passed
        if "initial_mask" in ready:
            self._sequences.set_initial_mask(ready["initial_mask"])
        self._sequences.set_masks(request_ids, ready["masks"])
        if self.controller is not None and "agree" in ready:
            self.controller.learn(ready["agree"].numpy(), slots, context, lengths)

    def optimize(self, batch: SequenceBatch, slots: np.ndarray, choice: Choice) -> Tensor:
        """See ``Policy``."""
        prior, device = None, batch.tokens.device
        if self.evidence is not None:
            on_device, fresh = to_device(slots, device), to_device(~self._sequences.has_own[slots], device)
            prior = self.evidence.prior(on_device, fresh)
        programme, hidden = self.run_programme(batch, prior, self._contexts[choice.context])
        similarity = programme.similarity[self._columns[choice.budget]].mean()
        self._similarities = self._similarities[1], HostCopy(similarity)
        margins = self._share(programme.margins)
        # One broken state must not stay in the averages; where nothing is known the layer is run.
        margins = torch.where(margins.isnan(), -1.0 if prior is None else prior, margins)
        self._budgets = self._budgets.to(device)  # and there it stays: a copy would wait for it
        result = {"masks": self._masks(margins > 0)}
        if self.evidence is not None:
            self.evidence.update(on_device, margins, prior, programme.means)
            result["initial_mask"] = self._masks(self.evidence.overall_choices())[0]
        if self.controller is not None:
            agree = self._passes.agreement(programme, self._budgets, hidden)
            result["agree"] = self._share(agree.float())
        self._passed = batch.request_ids, slots, choice.context, batch.max_lengths.numpy()
        if self._handover.put(result):
            self.apply()
        return hidden

    def _masks(self, choices: Tensor) -> Tensor:
        """[num_layers, columns, rows] bool to [rows, budgets, num_layers, 2] masks."""
        skipped = backtrack_all(choices, self._budgets)
        return skipped.unsqueeze(-1).expand(*skipped.shape, 2)

    def run_programme(
        self, batch: SequenceBatch, prior: Tensor | None = None, window: int | None = None
    ) -> tuple[Programme, Tensor]:
        """The dynamic programme on one token per row, and the target's final hidden states."""
        memory, centre = (self.evidence.memory, self.evidence.centre) if self.evidence else (0.0, None)
        return self._passes.programme(batch, self._max_skipped, prior, memory, centre, window)
