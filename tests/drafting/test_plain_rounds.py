"""Where speculation pays, a round goes without drafts now and then, to learn what that costs."""

import numpy as np
import pytest
import torch

from clasp_vllm.drafting.adaptive import PLAIN_EVERY, PLAIN_FIRST, AdaptiveDrafting
from clasp_vllm.skipping.controller import SIZES, PassCosts
from clasp_vllm.skipping.items import Items

LAYERS, BUDGETS = 8, (2, 4)


def controller(choices: tuple[str, ...], padded: bool = False) -> AdaptiveDrafting:
    """One that finds drafts almost free."""
    found = AdaptiveDrafting(
        16, BUDGETS, Items.layers(LAYERS), 4, None, choices, padded=padded, narrows=not padded, ranks=1
    )
    found.costs = PassCosts(tuple(map(float, SIZES)), (1e-3,) * len(SIZES), (0.0,) * len(SIZES))
    found.corrections.scales["draft_scale"][:] = 1e-3
    return found


def chosen(found: AdaptiveDrafting, rows: int, rounds: int, room: bool = False) -> list[int]:
    """The draft lengths of so many rounds; with ``room`` as many tokens are allowed as were wanted before."""
    masks = torch.zeros(16, len(BUDGETS), LAYERS, 2, dtype=torch.bool)
    lengths, allowed = [], 4
    for _ in range(rounds):
        choice = found.choose(np.arange(rows), masks, masks[0], allowed)
        allowed = found.wanted if room else 4
        lengths.append(choice.length)
    return lengths


@pytest.mark.parametrize("rows", [1, 5])
def test_one_round_of_many(rows):
    lengths = chosen(controller(("length", "speculation")), rows, PLAIN_FIRST + 3 * PLAIN_EVERY)
    plain = [round_ for round_, length in enumerate(lengths, start=1) if not length]
    assert plain == [PLAIN_FIRST + i * PLAIN_EVERY for i in range(4)]


def test_each_size_has_its_own():
    found = controller(("length", "speculation"))
    assert 0 in chosen(found, 1, PLAIN_FIRST)
    assert 0 not in chosen(found, 16, PLAIN_FIRST - 1)
    assert chosen(found, 16, 1) == [0]
    assert 0 not in chosen(found, 1, PLAIN_EVERY - 1)


def test_not_where_speculation_is_always_on():
    assert 0 not in chosen(controller(("length",)), 1, 2 * PLAIN_EVERY)


def test_where_room_is_made_ahead_the_next_round_has_none():
    lengths = chosen(controller(("length", "speculation"), padded=True), 1, PLAIN_FIRST + 4, room=True)
    assert [round_ for round_, length in enumerate(lengths, start=1) if not length] == [PLAIN_FIRST + 1]


def test_after_it_the_round_is_thought_over():
    """What is chosen next goes by the batch as it is then, as in any round of speculation."""
    found = controller(("length", "speculation"))
    assert chosen(found, 1, PLAIN_FIRST)[-1] == 0
    assert found._off_steps == 0
