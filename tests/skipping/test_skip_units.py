"""Layers and sub-layers as items that cost something."""

import pytest
import torch

from clasp_vllm.skipping.skip_units import UNITS, Items


def test_layers_cost_one_each():
    items = Items.layers(4, 3.0)
    assert items.costs == (1, 1, 1, 1)
    assert items.units == 1
    assert items.shares == (0.25, 0.75)
    mask = items.masks(torch.tensor([[True, False, False, True]]))
    assert mask.tolist() == [[[True, True], [False, False], [False, False], [True, True]]]
    assert items.layers_run(mask).tolist() == [2.0]


def test_sublayers_cost_by_their_weights():
    items = Items.sublayers(2, 2.2)
    assert items.costs == (1, 3, 1, 3)
    assert items.units == UNITS
    mask = items.masks(torch.tensor([True, False, False, True]))
    assert mask.tolist() == [[True, False], [False, True]]
    assert float(items.layers_run(mask)) == pytest.approx(1.0)
    assert items.cost([0, 1, 1]) == pytest.approx(items.shares[0] + 2 * items.shares[1])
    assert Items.sublayers(2, 1.0).costs == (2, 2, 2, 2)
    assert Items.sublayers(2, 99.0).costs == (1, 3, 1, 3)
    assert Items.sublayers(2, 0.01).costs == (3, 1, 3, 1)


def test_attention_costs_more_the_more_context_it_reads():
    """As of Llama-3-8B: 42 million weights of attention, 176 of MLP, 2048 numbers for each token before."""
    items = Items.sublayers(32, 176 / 42, per_token=2048 / 218e6)
    assert items.reading(0) == items
    assert items.reading(8192).costs == (1, 3) * 32  # one long request
    assert items.reading(8 * 8192).costs == (2, 2) * 32
    assert items.reading(64 * 8192).costs == (3, 1) * 32
    assert items.reading(64 * 8192).reading(0).costs != items.costs  # what is read adds up
    attention, mlp = items.reading(8 * 8192).shares
    assert attention / mlp == pytest.approx((42e6 + 8 * 8192 * 2048) / 176e6, rel=1e-2)


def test_whole_layers_cost_the_same_whatever_is_read():
    items = Items.layers(4, 3.0)
    assert items.reading(1e9) is items


def test_columns_grow_by_the_costs():
    assert Items.layers(6).columns(5) == [1, 2, 4, 4, 6, 6]
    assert Items.sublayers(3, 3.0).columns(9) == [1, 2, 8, 8, 10, 10]
