"""Predicts the length of each sequence's prompt-lookup match, so that the host need not wait for the GPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from clasp_vllm.device import HostCopy


class NgramLengthPredictor:
    """Exact where tokens are on the host.

    Where they are on the device it waits for nothing: it predicts for each sequence the length of the round
    before, for text that repeats itself mostly goes on to. Tokens that were predicted and are not there are
    rejected by verification, and so count against prompt lookup.
    """

    def __init__(self, capacity: int, late: bool) -> None:
        self._late = late
        self._expected = np.zeros(capacity, dtype=np.int64)
        self._before: tuple[np.ndarray, HostCopy] | None = None

    def predict(self, slots: np.ndarray, started: Sequence[int], match_lengths: Tensor) -> np.ndarray:
        """[rows] int64 tokens.

        Args:
            slots: [rows] int64.
            started: slots that new sequences have got since the last call.
            match_lengths: [rows] int64 on the device, of the matches now.
        """
        if not self._late:
            now: np.ndarray = match_lengths.numpy()
            return now
        before, self._before = self._before, (slots, HostCopy(match_lengths))
        if before is not None:
            self._expected[before[0]] = before[1].get().numpy()
        self._expected[list(started)] = 0
        expected: np.ndarray = self._expected[slots]
        return expected
