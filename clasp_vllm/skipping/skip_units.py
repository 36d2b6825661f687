"""What a draft runs or skips, and what that costs: whole layers, or attention and MLP each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clasp_vllm.skipping.dynamic_program import columns_at

UNITS = 4  # of a layer of two sub-layers: the programme has a column for every unit


@dataclass(frozen=True)
class Items:
    """The items of the dynamic programme, in the model's order.

    Attributes:
        num_layers: of the model.
        shares: of attention and MLP in what a layer costs; they add up to 1.
        costs: [items] units that skipping each saves: one per layer, or two for attention and MLP of each.
        per_token: what attention costs more for each token of context that a forward pass reads, in layers.
    """

    num_layers: int
    shares: tuple[float, float]
    costs: tuple[int, ...]
    per_token: float = 0.0

    @classmethod
    def layers(cls, num_layers: int, mlp_to_attention: float = 1.0) -> Items:
        """Whole layers, of one unit each."""
        return cls(num_layers, _shares(mlp_to_attention), (1,) * num_layers)

    @classmethod
    def sublayers(cls, num_layers: int, mlp_to_attention: float, per_token: float = 0.0) -> Items:
        """Attention and MLP of each layer, which cost ``UNITS`` together and at least one each."""
        shares = _shares(mlp_to_attention)
        attention = min(max(round(shares[0] * UNITS), 1), UNITS - 1)
        return cls(num_layers, shares, (attention, UNITS - attention) * num_layers, per_token)

    def reading(self, context: float) -> Items:
        """The items where a pass reads so many tokens of context, of all its rows together.

        Weights are read once for all rows, keys and values for each: the longer the contexts and the more
        rows, the more of a layer is attention.
        """
        if len(self.costs) == self.num_layers:
            return self
        attention, mlp = self.shares
        return self.sublayers(self.num_layers, mlp / (attention + context * self.per_token), self.per_token)

    @property
    def units(self) -> int:
        """Of a whole layer."""
        return sum(self.costs) // self.num_layers

    def columns(self, budget: int) -> list[int]:
        """[items] columns that go through each item of the programme."""
        return [columns_at(item, budget, self.costs) for item in range(len(self.costs))]

    def masks(self, skipped: Tensor) -> Tensor:
        """[..., items] bool to [..., num_layers, 2] bool masks."""
        shape, parts = skipped.shape[:-1], len(self.costs) // self.num_layers
        return skipped.reshape(*shape, self.num_layers, parts).expand(*shape, self.num_layers, 2)

    def layers_run(self, masks: Tensor) -> Tensor:
        """[..., num_layers, 2] bool masks to [...] float64, what is left to run, in layers."""
        shares = torch.tensor(self.shares, dtype=torch.float64)
        left: Tensor = (masks.logical_not().sum(-2) * shares).sum(-1)
        return left

    def cost(self, parts: Sequence[int]) -> float:
        """What single sub-layers cost, in layers. ``parts``: 0 for each attention, 1 for each MLP."""
        mlps = sum(parts)
        return mlps * self.shares[1] + (len(parts) - mlps) * self.shares[0]


def _shares(mlp_to_attention: float) -> tuple[float, float]:
    attention = 1 / (1 + mlp_to_attention)
    return attention, 1 - attention
