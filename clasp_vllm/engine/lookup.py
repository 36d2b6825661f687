"""Prompt lookup on the host: vLLM's, in what was written last before all of the context.

vLLM takes the earliest of the longest matches. What follows a recent one is right more often
(``scripts/bench/lookups.py``).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from vllm.config import VllmConfig
from vllm.v1.spec_decode.ngram_proposer import NgramProposer

RECENT = 64  # tokens


class PromptLookup:
    """Looks up the last tokens of sequences in what precedes them.

    Attributes:
        longest: tokens of a match at most.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._proposer = NgramProposer(vllm_config)
        self.longest: int = self._proposer.k

    def matches(self, rows: Iterable[int], lengths: np.ndarray, tokens: np.ndarray) -> list[list[int]]:
        """What follows the match of each sequence: [reqs], empty where there is none.

        Args:
            rows: the sequences to look up; of others there are no matches.
            lengths: [reqs] int, tokens of each.
            tokens: [reqs or more, max_model_len] int32.
        """
        lengths = lengths.astype(np.int32)  # vLLM has compiled the lookup for this type
        width = min(RECENT, tokens.shape[1])
        recent = np.minimum(lengths, width)
        columns = (lengths - recent)[:, None] + np.arange(width)
        window = np.take_along_axis(tokens[: len(lengths)], columns, axis=1)
        found = self._propose(rows, recent, window)
        room = np.maximum(self._proposer.max_model_len - lengths, 0)
        found = [match[:most] for match, most in zip(found, room, strict=True)]
        elsewhere = self._propose((row for row in rows if not found[row]), lengths, tokens)
        return [near or far for near, far in zip(found, elsewhere, strict=True)]

    def _propose(self, rows: Iterable[int], lengths: np.ndarray, tokens: np.ndarray) -> list[list[int]]:
        sampled: list[list[int]] = [[] for _ in lengths]  # vLLM looks up those that have sampled
        for row in rows:
            sampled[row] = [0]
        drafts: list[list[int]] = self._proposer.propose(self.longest, sampled, lengths, tokens)
        return drafts
