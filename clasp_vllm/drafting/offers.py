"""How many tokens the context offers each sequence: what the host goes by when it chooses how to draft."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from clasp_vllm.drafting.host import HostCopy


class Offers:
    """Known at once where tokens are on the host.

    Where they are on the device it waits for nothing: it expects of each sequence what was found for it one
    round ago, for text that repeats itself mostly goes on to. What is expected and not there is refused by
    verification, and so counts against n-grams.
    """

    def __init__(self, capacity: int, late: bool) -> None:
        self._late = late
        self._expected = np.zeros(capacity, dtype=np.int64)
        self._before: tuple[np.ndarray, HostCopy] | None = None

    def expect(self, slots: np.ndarray, started: Sequence[int], offered: Tensor) -> np.ndarray:
        """[rows] int64 tokens.

        Args:
            slots: [rows] int64.
            started: slots that new sequences have got since the last call.
            offered: [rows] int64, by the context now.
        """
        if not self._late:
            now: np.ndarray = offered.numpy()
            return now
        before, self._before = self._before, (slots, HostCopy(offered))
        if before is not None:
            self._expected[before[0]] = before[1].get().numpy()
        self._expected[list(started)] = 0
        expected: np.ndarray = self._expected[slots]
        return expected
