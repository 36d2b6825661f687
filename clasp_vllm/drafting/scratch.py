"""Scratch blocks: where the columns of an optimisation pass keep the key and value of their token.

Every column of the dynamic programme is a virtual request: one query token at the request's next
position, with a block table equal to the request's except that the last block is a private scratch
block holding a copy of it. The column then attends to the request's exact past and to its own key
and value, through the engine's ordinary paged attention. Where column 0 is the target, it works
on the request's own block: what it writes there is what verification will write again.
"""

from __future__ import annotations

import torch
from torch import Tensor


class ScratchBlocks:
    """The KV blocks that the scheduler does not know of, for up to ``max_rows`` rows at once.

    Block ids run from ``first_block`` on: ``columns`` blocks for each row, one after another.
    """

    def __init__(
        self, first_block: int, max_rows: int, columns: int, block_size: int, device: torch.device
    ) -> None:
        ids = torch.arange(max_rows * columns, dtype=torch.int32, device=device) + first_block
        self._ids = ids.view(max_rows, columns)
        self.block_size = block_size

    def virtual_requests(self, block_table: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The block tables of the programme's columns, and the copies to make first.

        Args:
            block_table: [rows, width] int32, the requests' own.
            positions: [rows] int64, position of the token the columns compute.

        Returns:
            tables: [(columns + 1) * rows, width] int32, column-major, column 0 the requests' own.
            source: [rows] int64, the block that each row's scratch blocks are to be copies of.
            target: [rows, columns] int64, the scratch blocks, consecutive in each row.
        """
        rows, width = block_table.shape
        last = (positions // self.block_size).clamp(max=width - 1).unsqueeze(1)
        scratch = self._ids[:rows]
        columns = scratch.shape[1]
        tables = block_table.expand(columns + 1, rows, width).clone()
        tables[1:].scatter_(2, last.expand(columns, rows, 1), scratch.t().unsqueeze(-1))
        return tables.flatten(0, 1), block_table.gather(1, last).squeeze(1).long(), scratch.long()
