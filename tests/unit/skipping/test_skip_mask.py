from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clasp_vllm.skipping.skip_mask import evenly_spaced_layers, layers_mask


@given(st.integers(2, 100), st.data())
def test_evenly_spaced(num_layers, data):
    count = data.draw(st.integers(0, num_layers - 1))
    layers = evenly_spaced_layers(num_layers, count)
    assert len(set(layers)) == count
    assert all(0 <= layer < num_layers for layer in layers)
    if count <= num_layers - 2:
        assert 0 not in layers
        assert num_layers - 1 not in layers
        gaps = [b - a for a, b in pairwise(layers)]
        assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("skip_layers", [[], [0], [3, 1]])
def test_layers_mask_skips_both_parts(skip_layers):
    mask = layers_mask(4, skip_layers)
    assert mask.shape == (4, 2)
    assert sorted(mask.all(1).nonzero().flatten().tolist()) == sorted(skip_layers)
    assert (mask.any(1) == mask.all(1)).all()
