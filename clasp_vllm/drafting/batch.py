"""What drafting takes from the engine: a batch of sequences, and attention over their paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from clasp_vllm.device import to_device


class PagedAttention(Protocol):
    """What drafting needs of the engine's attention."""

    max_model_len: int  # tokens that the cache holds of one sequence at most
    max_rows: int  # of one pass
    block_size: int  # tokens in a block
    sink: bool  # whether a sequence's first block is always there: with a sliding window it is freed
    scratch_block: int  # a block that the scheduler does not know of, if there are any

    def decode(
        self, positions: Tensor, block_table: Tensor, max_lengths: Tensor
    ) -> AbstractContextManager[object]:
        """A forward context for one query token per row, or several; yields what it was made of.

        Each row attends to, and writes the key and value of, its position in the blocks of its row
        of ``block_table`` ([rows, width] int32); ``max_lengths`` ([rows] int32, on the host) bounds
        positions + 1 from above. Positions from ``max_model_len`` on write nothing. Of several
        tokens the ``positions`` ([rows * queries] int64) follow one another, row by row.
        """
        ...

    def copy_blocks(self, layer: int, source: Tensor, target: Tensor) -> None:
        """Copy block ``source[i]`` over blocks ``target[i]`` ([n] and [n, copies] int64) of a layer.

        The blocks of each row of ``target`` are consecutive.
        """
        ...


# What a step read of prompts: of each request the position of the first token of its prompt that it ran, the
# final hidden states [tokens, hidden_size] of these tokens, at least one, and whether they are the last.
PromptTokens = Sequence[tuple[str, int, Tensor, bool]]


def prompt_tokens(
    request_ids: Sequence[str],
    hidden: Tensor,
    ends: np.ndarray,
    computed: np.ndarray,
    prompt_lengths: np.ndarray,
) -> PromptTokens:
    """Cut the tokens of prompts out of a step.

    Args:
        request_ids: [reqs] of the step.
        hidden: [tokens, hidden_size] of all its tokens, request by request.
        ends: [reqs + 1] int, where each begins and the last ends.
        computed: [reqs] int, tokens of each that were computed before.
        prompt_lengths: [reqs] int.
    """
    left = np.minimum(prompt_lengths - computed, ends[1:] - ends[:-1])
    return [
        (
            request_ids[row],
            int(computed[row]),
            hidden[ends[row] : ends[row] + left[row]],
            bool(computed[row] + left[row] == prompt_lengths[row]),
        )
        for row in np.flatnonzero(left > 0)
    ]


@dataclass(frozen=True)
class NgramMatches:
    """What followed the last time that each sequence's last tokens occurred in it.

    Attributes:
        tokens: [rows, width] int64; past a row's length they are anything.
        lengths: [rows] int64, how many followed; 0 where the last tokens have never occurred before.
    """

    tokens: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, token_lists: Sequence[Sequence[int]], width: int) -> NgramMatches:
        """From lists of ``width`` tokens at most."""
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in token_lists], dtype=torch.int64)
        return cls(tokens, torch.tensor([len(row) for row in token_lists], dtype=torch.int64))

    def select(self, rows: Tensor) -> NgramMatches:
        """The given rows."""
        return NgramMatches(self.tokens[rows], self.lengths[rows])


@dataclass(frozen=True)
class SequenceBatch:
    """The sequences to draft for: those that have just sampled a token.

    Attributes:
        request_ids: [rows] names of the sequences.
        tokens: [rows] int, each sequence's last sampled token.
        positions: [rows] int64, the position of that token.
        block_table: [rows, width] int32.
        max_lengths: [rows] int32 on the host, at least positions + 1.
        sampling: [rows] bool on the host, whether the request samples; None: not known.
        ngrams: prompt-lookup matches; None: not looked up.
        stop_tokens: [rows] the tokens that end each sequence; None: not known.
        running: [reqs] names of all sequences that have just sampled a token, those among them that are not
            drafted for; None: they are those of ``request_ids``.
    """

    request_ids: Sequence[str]
    tokens: Tensor
    positions: Tensor
    block_table: Tensor
    max_lengths: Tensor
    sampling: np.ndarray | None = None
    ngrams: NgramMatches | None = None
    stop_tokens: Sequence[set[int]] | None = None
    running: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.request_ids)

    def select(self, rows: np.ndarray) -> SequenceBatch:
        """The given rows."""
        if len(rows) == len(self) and (rows == np.arange(len(self))).all():
            return self
        on_device = to_device(rows, self.tokens.device)
        return SequenceBatch(
            [self.request_ids[row] for row in rows],
            self.tokens[on_device],
            self.positions[on_device],
            self.block_table[on_device],
            self.max_lengths[torch.from_numpy(rows)],
            None if self.sampling is None else self.sampling[rows],
            None if self.ngrams is None else self.ngrams.select(on_device),
            None if self.stop_tokens is None else [self.stop_tokens[row] for row in rows],
            self.running,
        )
