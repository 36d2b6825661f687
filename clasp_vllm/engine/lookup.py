"""Prompt lookup on the host: vLLM's, in what was written last before all of the context.

vLLM takes the earliest of the longest matches. What follows a recent one is right more often
(``scripts/bench/lookups.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from vllm.config import VllmConfig

# Not vLLM's search of a batch: it starts the threads of numba, which take the cores from those of the model.
from vllm.v1.spec_decode.ngram_proposer import _find_longest_matched_ngram_and_propose_tokens as find_match

RECENT = 64  # tokens


class PromptLookup:
    """Looks up the last tokens of sequences in what precedes them.

    Attributes:
        longest: tokens of a match at most.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        config = vllm_config.speculative_config
        assert config is not None
        self.longest: int = config.num_speculative_tokens
        self._ngram = config.prompt_lookup_min, config.prompt_lookup_max
        self._max_model_len = vllm_config.model_config.max_model_len
        self._match(np.zeros(self._max_model_len, dtype=np.int32), 0)  # numba compiles it now

    def matches(self, rows: Iterable[int], lengths: Sequence[int], tokens: np.ndarray) -> list[list[int]]:
        """What follows the match of each sequence: [reqs], empty where there is none.

        Args:
            rows: the sequences to look up; of others there are no matches.
            lengths: [reqs], tokens of each.
            tokens: [reqs or more, max_model_len] int32.
        """
        found: list[list[int]] = [[] for _ in lengths]
        for row in rows:
            context = tokens[row, : lengths[row]]
            room = min(self.longest, self._max_model_len - len(context))
            found[row] = self._match(context[-RECENT:], room) or self._match(context, room)
        return found

    def _match(self, context: np.ndarray, room: int) -> list[int]:
        match: list[int] = find_match(context, *self._ngram, len(context) + room, self.longest).tolist()
        return match
