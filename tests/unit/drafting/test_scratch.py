import torch

from clasp_vllm.drafting.scratch import ScratchBlocks


def test_columns_differ_from_the_request_in_its_last_block_only():
    columns, rows, block_size = 3, 2, 16
    scratch = ScratchBlocks(
        100, max_rows=4, columns=columns, block_size=block_size, device=torch.device("cpu")
    )
    block_table = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]], dtype=torch.int32)
    positions = torch.tensor([33, 16])  # in the third block, at the start of the second
    tables, source, target = scratch.virtual_requests(block_table, positions)
    tables = tables.view(columns + 1, rows, 4)
    assert torch.equal(tables[0], block_table)
    last = torch.tensor([2, 1])
    own = set()
    for column in range(1, columns + 1):
        for row in range(rows):
            changed = (tables[column, row] != block_table[row]).nonzero().flatten()
            assert changed.tolist() == [last[row]]
            own.add(int(tables[column, row, last[row]]))
    assert len(own) == columns * rows
    assert own == set(target.flatten().tolist())
    assert min(own) >= 100
    assert max(own) < 100 + 4 * columns
    assert source.tolist() == [int(block_table[row, last[row]]) for row in range(rows)]
    for row in range(rows):
        assert target[row].tolist() == tables[1:, row, last[row]].tolist()
        assert target[row].tolist() == list(range(int(target[row, 0]), int(target[row, 0]) + columns))


def test_position_past_the_table_is_harmless():
    scratch = ScratchBlocks(10, 1, 1, 4, torch.device("cpu"))
    tables, source, _ = scratch.virtual_requests(torch.tensor([[3, 4]], dtype=torch.int32), torch.tensor([8]))
    assert tables.tolist() == [[3, 4], [3, 10]]
    assert source.tolist() == [4]
