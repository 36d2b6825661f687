"""SWIFT (arXiv 2410.06916): sub-layers found by trying sets on the tokens generated last. A baseline.

All requests skip the same. In every round the last tokens of one request are drafted once more, all in one
pass, with other sub-layers left out; the set that says most of them again is used from then on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from clasp_vllm.drafting.batch import DraftBatch
from clasp_vllm.drafting.passes import Passes
from clasp_vllm.drafting.sequences import SequenceTable
from clasp_vllm.policies.base import Policy
from clasp_vllm.skipping.swift_search import WINDOW, SkipSet, SwiftSearch


class Swift(Policy):
    """Tries one set in a round, as long as the search goes on. Needs the tokens on the host."""

    def __init__(
        self,
        sequences: SequenceTable,
        passes: Passes,
        num_layers: int,
        skip_ratio: float,
        share: Callable[[Tensor], Tensor] = lambda found: found,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        """
        Args:
            skip_ratio: see ``SwiftSearch``.
            share: makes what is tried and found the same on all ranks that run the layers together.
            log: told in words when the search has ended.
        """
        self._sequences = sequences
        self._passes = passes
        self._num_layers = num_layers
        self._skip_ratio = skip_ratio
        self._share = share
        self._log = log
        self.reset()

    @property
    def reads_generated(self) -> int:
        """See ``Policy``."""
        return 0 if self.search.ended else WINDOW + 1

    def reset(self) -> None:
        """See ``Policy``."""
        self.search = SwiftSearch(self._num_layers, self._skip_ratio)
        self._use(sublayers_mask(self._num_layers, self.search.best))

    def learn(self, batch: DraftBatch) -> bool:
        """See ``Policy``."""
        rows = [row for row, told in enumerate(batch.generated or ()) if len(told) > WINDOW]
        if self.search.ended or not rows:
            return False
        row = rows[self.search.steps % len(rows)]
        assert batch.generated is not None
        tokens = torch.from_numpy(batch.generated[row])
        mask = self._share(sublayers_mask(self._num_layers, self.search.candidate()).byte()).bool()
        one = batch.select(np.array([row]))
        agree = self._passes.replay(one, tokens, mask)
        score = float(self._share(agree.float().mean().reshape(1)))
        skipped = frozenset(mask.flatten().nonzero().flatten().tolist())
        if self.search.tell(skipped, score):
            self._use(mask)
        if self.search.ended:
            self._log(
                f"SWIFT's search has ended after {self.search.steps} sets; the best said "
                f"{self.search.best_score:.2f} of the tokens again"
            )
        return True

    def _use(self, mask: Tensor) -> None:
        self._sequences.set_initial_mask(mask.unsqueeze(0))
        self._sequences.set_shared_mask(mask.unsqueeze(0))


def sublayers_mask(num_layers: int, skipped: SkipSet) -> Tensor:
    """[num_layers, 2] mask that skips the given sub-layers, numbered as in ``SwiftSearch``."""
    mask = torch.zeros(2 * num_layers, dtype=torch.bool)
    mask[sorted(skipped)] = True
    return mask.view(num_layers, 2)
