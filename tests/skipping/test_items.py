"""Layers and sub-layers as items that cost something."""

import pytest
import torch

from clasp_vllm.skipping.items import GREATEST_COST, Items


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
    assert items.costs == (1, 2, 1, 2)
    assert items.units == 3
    mask = items.masks(torch.tensor([True, False, False, True]))
    assert mask.tolist() == [[True, False], [False, True]]
    assert float(items.layers_run(mask)) == pytest.approx(1.0)
    assert items.cost([0, 1, 1]) == pytest.approx(items.shares[0] + 2 * items.shares[1])
    assert Items.sublayers(2, 9.0).costs == (1, GREATEST_COST) * 2
    assert Items.sublayers(2, 0.1).costs == (1, 1, 1, 1)


def test_columns_grow_by_the_costs():
    assert Items.layers(6).columns(5) == [1, 2, 4, 4, 6, 6]
    assert Items.sublayers(3, 3.0).columns(9) == [1, 2, 8, 8, 10, 10]
