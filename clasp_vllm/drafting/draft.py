"""What a drafting round is asked for and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from clasp_vllm.control.planner import Choice
from clasp_vllm.device import DeviceEvent
from clasp_vllm.drafting.tokens import DraftTokenBuffer


class Sample(Protocol):
    """Chooses draft tokens."""

    def __call__(
        self, hidden: Tensor, positions: Tensor, step: int, rows: np.ndarray, exact: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[n] int64 tokens and, where the drafter asks for it, [n] float32, how probable each's likeliest is.

        Args:
            hidden: [n, hidden_size] final states.
            positions: [n].
            step: of the round.
            rows: [n] int64 of the batch.
            exact: [m] int64, which of ``hidden`` are the target's own; None: none of them.
        """
        ...


@dataclass(frozen=True)
class DrafterOptions:
    """How to draft.

    Attributes:
        budgets: the numbers of layers to skip that there are to choose from, ascending.
        contexts: the windows of context to choose from, in tokens, descending; None: all of it.
        optimization_interval: rounds between two choices of a sequence's layers, unless a controller says.
        draft_exit_threshold: stop drafting a sequence after a token less probable than this; 0 = off;
            None: the controller says when, if there is one.
    """

    budgets: tuple[int, ...]
    contexts: tuple[int | None, ...]
    optimization_interval: int
    draft_exit_threshold: float | None


class DraftOutput(NamedTuple):
    """A round's drafts.

    Attributes:
        tokens: [rows, num_tokens] int64. All of them are valid to verify, those past a row's length merely
            unlikely to be accepted.
        lengths: [rows] int64, how many of a row's tokens are worth verifying.
        drawn: [rows, num_tokens] int64 on the host, which of all rows that were sampled each token is, in
            the order of the calls of ``sample``; -1 for tokens that were not sampled.
    """

    tokens: Tensor
    lengths: Tensor
    drawn: np.ndarray


@dataclass(frozen=True)
class LayerSkipDraft:
    """Drafts made by skipping layers.

    Attributes:
        draft: the tokens.
        due: rows whose layers were chosen in this round; the first token of these is certain.
        masks: [rows, num_layers, 2] bool on the host, what each row skipped.
        events: the start of the round, the end of its optimisation pass, and its end.
    """

    draft: DraftTokenBuffer
    due: np.ndarray
    masks: Tensor
    events: tuple[DeviceEvent, DeviceEvent, DeviceEvent]


@dataclass(frozen=True)
class DraftRound:
    """What a round did.

    Attributes:
        slots: [rows] int64, of the ``SequenceTable``.
        choice: what was to be drafted, and how.
        looked_up: [rows] bool, whether the draft is an n-gram of the context.
        skipping: [n] int64, the rows drafted for by skipping layers.
        skip_drafts: the drafts of these; None if there are none.
        output: the drafts of all rows.
    """

    slots: np.ndarray
    choice: Choice
    looked_up: np.ndarray
    skipping: np.ndarray
    skip_drafts: LayerSkipDraft | None
    output: DraftOutput
