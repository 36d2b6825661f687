"""How much of its past a draft attends to: all of it, or an attention sink and a window of the last tokens.

Keys are stored with their positions rotated into them, so a row may attend to any blocks of a paged cache. A
draft with a shorter context has a shorter block table: the sequence's first block, the sink (arXiv
2309.17453), and its last ones, as MagicDec drafts (arXiv 2408.11049). The draft's own tokens are in the last
blocks, so that they are written to the same slots as with the whole table.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class CacheRows(NamedTuple):
    """Where the rows of a pass read and write in the paged cache.

    Attributes:
        positions: [rows] int64, of each row's token among those that its blocks hold.
        block_table: [rows, width] int32.
        max_lengths: [rows] int32 on the host, at least positions + 1.
    """

    positions: Tensor
    block_table: Tensor
    max_lengths: Tensor


def tokens_read(window: int, block_size: int, sink: bool = True) -> int:
    """How many tokens a row with a window attends to at most, the sink among them."""
    return (int(sink) + _window_blocks(window, block_size)) * block_size


def cut_context(
    rows: CacheRows, window: int | None, block_size: int, max_model_len: int, sink: bool = True
) -> CacheRows:
    """Leave the blocks between the first one and a window out.

    Args:
        sink: whether to keep the first one. With a sliding window it may be another sequence's by now.
        window: tokens, the row's own among them, that are there wherever in a block it stands; None: all.
        max_model_len: positions from there on stay as they are, for they write nothing.

    Returns:
        ``rows`` as they are where none has as many tokens as are left.
    """
    if window is None:
        return rows
    most, blocks = tokens_read(window, block_size, sink), int(sink) + _window_blocks(window, block_size)
    if int(rows.max_lengths.max()) <= most:
        return rows
    positions, table, max_lengths = rows
    left_out = (positions // block_size - blocks + 1).clamp(min=0)
    left_out = torch.where(positions < max_model_len, left_out, 0)
    column = torch.arange(min(blocks, table.shape[1]), device=table.device)
    kept = column + left_out.unsqueeze(1) * (column >= int(sink))
    table = table.gather(1, kept.clamp(max=table.shape[1] - 1))
    return CacheRows(positions - left_out * block_size, table, max_lengths.clamp(max=most))


def _window_blocks(window: int, block_size: int) -> int:
    return -(-(window - 1) // block_size) + 1
