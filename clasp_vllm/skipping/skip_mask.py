"""Skip masks: which sub-layers of the target model a sequence's draft leaves out.

A mask is a bool tensor [num_layers, 2]: (attention, MLP) of each layer, True where it is skipped.
Methods that skip whole layers (CLaSp, Self-SD) keep both columns equal.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

ATTENTION, MLP = 0, 1


def layers_mask(num_layers: int, skip_layers: Collection[int]) -> Tensor:
    """[num_layers, 2] mask that skips the given whole layers."""
    mask = torch.zeros(num_layers, 2, dtype=torch.bool)
    mask[sorted(skip_layers)] = True
    return mask


def evenly_spaced_layers(num_layers: int, num_skipped: int) -> list[int]:
    """``num_skipped`` layers spread evenly; the outer layers are the last to go.

    The first and last layers of a language model change the hidden state most (CLaSp, section 5),
    so the spread is over the layers between them for as long as there are enough.
    """
    inner = num_layers - 2
    first, span = (1, inner) if num_skipped <= inner else (0, num_layers)
    return [first + (2 * i + 1) * span // (2 * num_skipped) for i in range(num_skipped)]
