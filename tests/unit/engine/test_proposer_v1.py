"""What of its drafts Model Runner V1's proposer has verified."""

import numpy as np
import torch

from clasp_vllm.drafting.draft import DraftOutput
from clasp_vllm.engine.proposer_v1 import _worth_verifying


def test_nothing_is_verified_past_a_token_that_ends_the_answer():
    """Nor past a draft's length, or the room that is left. Request 1 is not drafted for."""
    tokens = torch.tensor([[5, 7, 6, 7], [5, 6, 8, 7], [7, 7, 7, 7]])
    output = DraftOutput(tokens, torch.tensor([4, 2, 3]), np.full((3, 4), -1))
    rows, room = np.array([0, 2, 3]), np.array([4, 4, 2])
    short = _worth_verifying(output, rows, room, [{7, None}, {7}, {8, None}, {None}])
    assert short == [[5, 7], [], [5, 6], [7, 7]]
    assert _worth_verifying(None, rows, room, [set()] * 4) == [[], [], [], []]
