"""What parts of a layer cost."""

import pytest
import torch

from clasp_vllm.control.costs import LayerShares


def test_what_is_left_to_run():
    shares = LayerShares.of(10, 30)
    assert (shares.attention, shares.mlp) == (0.25, 0.75)
    masks = torch.tensor([[[True, False], [False, True], [True, True], [False, False]], [[False, False]] * 4])
    assert shares.layers_run(masks).tolist() == pytest.approx([0.75 + 0.25 + 0 + 1, 4.0])
    assert shares.cost([0, 1, 1]) == pytest.approx(0.25 + 2 * 0.75)
    assert shares.cost([]) == 0.0
