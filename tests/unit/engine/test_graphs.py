"""How far replays may be off at start-up. There are no graphs here: ``tests/engine`` has them, on tapes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from clasp_vllm.engine.graphs import DraftGraphs


def compared(off: float, own_weights: bool, dtype: torch.dtype = torch.float32) -> str | None:
    """What the comparison says of replays that are off by so much, of eager calls that give ones."""
    graphs = object.__new__(DraftGraphs)
    ones = torch.ones(2, 8, dtype=dtype)
    graphs._passes = SimpleNamespace(
        own_weights=own_weights,
        draft_step_eagerly=lambda batch, plan: ones,
        head_eagerly=lambda hidden: (ones, None),
    )
    graphs._random_step = lambda rows, generator: (None, None)
    graphs.draft_step = lambda batch, plan: ones * (1 + off)
    graphs.head = lambda hidden: (ones, None)
    return graphs._compare(2, torch.Generator())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_of_quantised_products_is_no_mismatch(dtype):
    """A float32 target's too: on GPUs its quantised products are computed in 16 bits."""
    assert compared(0.03, True, dtype) is None
    assert "2 rows are off" in compared(0.03, False, dtype)


def test_what_is_wrong_is_a_mismatch_with_any_weights():
    for own_weights in (False, True):
        assert "the states" in compared(0.3, own_weights)
        assert "the states" in compared(torch.nan, own_weights)
