"""CLaSp's dynamic programme: which layers to skip so that the last hidden state changes least.

Source: CLaSp (arXiv 2505.24196), section 3.4 and Algorithm 1. With ``x_i`` the hidden state of a
token after layer ``i`` of the full model and ``f_i`` that layer, ``g(i, j)`` is the best state
found after ``i`` layers of which ``j`` are skipped::

    run  = f_i(g(i-1, j))        skip = g(i-1, j-1)
    g(i, j) = whichever has the larger cosine similarity to x_i;  g(i, 0) = x_i;  g(i, i) = x_0

Column ``j`` holds ``g(., j)``. All columns of all rows go through a layer in one batch (the
paper's sequence parallelism). Column 0 skips nothing, so it is the full model itself: it supplies
every ``x_i``, and what it predicts is exactly what the full model predicts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# A hidden state split into summands, the form in which vLLM's layers pass it on:
# (output of the last sub-layer, residual stream before it), both [rows, hidden_size].
State = tuple[Tensor, Tensor]
Layer = Callable[[int, State], State]


@dataclass(frozen=True)
class Programme:
    """Outcome of the programme for a batch of rows.

    Attributes:
        skipped: [num_layers, columns, rows] bool, whether the best path to ``g(i+1, j)`` skips
            layer ``i``.
        states: the states after the last layer, a pair of [columns, rows, hidden_size]. Column
            ``j`` is what the model hands to its head when it skips the best ``j`` layers.
        similarity: [columns, rows] float32, cosine of ``states`` to the full model's (column 0).
    """

    skipped: Tensor
    states: State
    similarity: Tensor

    def mask(self, num_skipped: int | Tensor) -> Tensor:
        """Backtrack the set of layers to skip.

        Args:
            num_skipped: the budget, 0 <= budget < columns: one for all rows, or [rows] int64.

        Returns:
            [rows, num_layers] bool, True where the layer is skipped; each row holds exactly its
            budget of True.
        """
        num_layers, _, rows = self.skipped.shape
        column = torch.as_tensor(num_skipped, device=self.skipped.device).expand(1, rows)
        mask = torch.empty(rows, num_layers, dtype=torch.bool, device=self.skipped.device)
        for layer in reversed(range(num_layers)):
            skip = self.skipped[layer].gather(0, column)
            mask[:, layer] = skip[0]
            column = column - skip.long()
        return mask


def run_programme(state: State, layer: Layer, num_layers: int, max_skipped: int) -> Programme:
    """Run the programme for a batch of rows. Never synchronises with the host.

    Args:
        state: ``x_0`` as a pair of [rows, hidden_size] tensors whose sum is the embedding.
        layer: ``layer(i, state)`` applies layer ``i`` to a pair of [columns * rows, hidden_size]
            tensors, column-major, and may overwrite them.
        num_layers: the number of layers L.
        max_skipped: the largest budget M, 0 <= M < L.

    Raises:
        ValueError: max_skipped is outside of [0, num_layers).
    """
    if not 0 <= max_skipped < num_layers:
        raise ValueError(f"max_skipped must be in [0, {num_layers}), got {max_skipped}")
    columns = max_skipped + 1
    rows, hidden_size = state[0].shape
    delta, residual = (x.expand(columns, rows, hidden_size) for x in state)
    hidden = delta + residual
    skipped = torch.zeros(num_layers, columns, rows, dtype=torch.bool, device=delta.device)
    similarity = hidden.new_zeros(columns, rows, dtype=torch.float32)

    for i in range(num_layers):
        ran = layer(i, (_flat_copy(delta), _flat_copy(residual)))
        run_delta, run_residual = (x.view(columns, rows, hidden_size) for x in ran)
        run_hidden = run_delta + run_residual
        target = run_hidden[0]

        similarity = _cosine(run_hidden, target)
        skip_similarity = _cosine(hidden[:-1], target)  # column j - 1 enters column j
        skip = skip_similarity > similarity[1:]
        skip[i:] = True  # g(i, j) with j >= i can only have skipped every layer so far
        skipped[i, 1:] = skip

        take = skip.unsqueeze(-1)
        delta = _choose(take, delta, run_delta)
        residual = _choose(take, residual, run_residual)
        hidden = _choose(take, hidden, run_hidden)
        similarity[1:] = torch.where(skip, skip_similarity, similarity[1:])

    return Programme(skipped, (delta, residual), similarity)


def _flat_copy(x: Tensor) -> Tensor:
    # A layer may work in place, and the columns are still needed as they are.
    return x.flatten(0, 1).clone(memory_format=torch.contiguous_format)


def _choose(take: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """[columns, rows, hidden]: column j - 1 of ``before`` where taken, else column j of ``after``."""
    return torch.cat((after[:1], torch.where(take, before[:-1], after[1:])))


def _cosine(states: Tensor, target: Tensor) -> Tensor:
    """[columns, rows] float32 cosine of [columns, rows, hidden] to [rows, hidden]."""
    return torch.cosine_similarity(states.float(), target.float(), dim=-1)
