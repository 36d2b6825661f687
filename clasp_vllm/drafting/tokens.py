"""The tokens of a drafting round as they come, and which sequences are still drafted for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from clasp_vllm.control.early_exit import Exit
from clasp_vllm.device import HostFlag, to_device
from clasp_vllm.drafting.batch import SequenceBatch

SHORT = 4  # draft tokens, for which asking the device whether to go on costs more than going on


class DraftTokenBuffer:
    """Tokens drafted so far, of every row of a batch.

    Where the host knows at once which rows stop (``drop``), these leave the round, and rows may be
    ahead of others. Else all go on together until every one has stopped, a step late.

    Attributes:
        tokens: [rows, width] int64.
        lengths: [rows] int64, how many are worth verifying.
        confidence: [rows, width] float32, how sure the draft was; None where no ``exit`` asks.
        drawn: [rows, width] int64 on the host, which of all rows sampled in the round each token is; -1 for
            those that only fill up.
        left: [n] int64, the rows still drafted for.
        count: [rows] int64, tokens of each so far.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        exit: Exit | None,
        drop: bool,
        device: torch.device,
        stop_tokens: Sequence[set[int]] | None = None,
    ) -> None:
        """``stop_tokens``: [rows] those after which a row stops, with ``drop``; None: there are none."""
        self.tokens = torch.zeros(rows, width, dtype=torch.int64, device=device)
        self.lengths = torch.full((rows,), width, dtype=torch.int64, device=device)
        self.confidence = None if exit is None else torch.zeros(rows, width, device=device)
        self.drawn = np.full((rows, width), -1)
        self.left = np.arange(rows)
        self.count = np.zeros(rows, dtype=np.int64)
        self._width, self._exit, self._drop, self._stop_tokens = width, exit, drop, stop_tokens
        self._continue = HostFlag(device) if drop or width > SHORT or device.type == "cpu" else None

    def take(self, rows: np.ndarray, tokens: Tensor, confidence: Tensor | None, drawn: np.ndarray) -> None:
        """A further token of some rows that are left.

        Args:
            tokens: [n] int64.
            confidence: [n] float32, how sure the draft is of it.
            drawn: [n] int64, see the attribute.
        """
        at = self._place(rows, self.count[rows])
        self.tokens[at] = tokens
        self.drawn[rows, self.count[rows]] = drawn
        self.count[rows] += 1
        stops = None
        if self._exit is not None and self.confidence is not None:
            assert confidence is not None
            self.confidence[at] = confidence
            stops = self._exit.stops(confidence, at[0])
        if self._drop:
            done = self.count[rows] == self._width
            if stops is not None:
                done |= stops.numpy()
            if self._stop_tokens is not None:
                pairs = zip(rows, tokens.tolist(), strict=True)
                done |= np.array([token in self._stop_tokens[row] for row, token in pairs], dtype=bool)
            stopped = rows[done]
            self.lengths[torch.from_numpy(stopped)] = torch.from_numpy(self.count[stopped])
            self.left = np.setdiff1d(self.left, stopped, assume_unique=True)
        elif stops is not None:
            count = int(self.count[0])  # all alike
            self.lengths = torch.where(stops, self.lengths.clamp(max=count), self.lengths)
            if self._continue is not None and not self._continue.update((self.lengths > count).any()):
                self.tokens[:, count:] = tokens.unsqueeze(1)
                self.left = self.left[:0]

    def finish(self) -> None:
        """No more steps: rows that are left end where they are."""
        if self._drop:
            self.lengths[torch.from_numpy(self.left)] = torch.from_numpy(self.count[self.left])

    def following(self, batch: SequenceBatch) -> SequenceBatch:
        """The rows that are left with their last token and its position. ``batch``: as the round began."""
        count = self.count[self.left]
        on = batch.select(self.left)
        return replace(
            on,
            tokens=self.tokens[self._place(self.left, count - 1)],
            positions=on.positions + self._offset(count),
            max_lengths=on.max_lengths + torch.from_numpy(count.astype(np.int32)),
        )

    def _place(self, rows: np.ndarray, column: np.ndarray) -> tuple[slice | Tensor, int | Tensor]:
        offset = self._offset(column)
        if len(rows) == len(self.count) and isinstance(offset, int):
            return slice(None), offset
        return to_device(rows, self.tokens.device), offset

    def _offset(self, column: np.ndarray) -> int | Tensor:
        if len(column) and (column == column[0]).all():
            return int(column[0])
        return to_device(column, self.tokens.device)
