"""CLaSp's dynamic programme: which layers to skip so that the last hidden state changes least.

Source: CLaSp (arXiv 2505.24196), section 3.4 and Algorithm 1. With ``x_i`` the hidden state of a
token after layer ``i`` of the target and ``f_i`` that layer, ``g(i, j)`` is the best state
found after ``i`` layers of which ``j`` are skipped::

    run  = f_i(g(i-1, j))        skip = g(i-1, j-1)
    g(i, j) = whichever has the larger cosine similarity to x_i;  g(i, 0) = x_i;  g(i, i) = x_0

Column ``j`` holds ``g(., j)``. All columns of all rows go through a layer in one batch (the
paper's sequence parallelism), as far as they differ by then. Column 0 skips nothing, so it is the
target itself: it supplies every ``x_i``, and what it predicts is exactly what the target
predicts.

Hidden states of all tokens have a large part in common, most of it in a few dimensions. Where the mean of
``x_i`` over earlier tokens is known, it is subtracted from both states before they are compared (not in the
paper).
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
        margins: [num_layers, columns, rows] float32, by how much skipping layer ``i`` on the way to
            ``g(i+1, j)`` is better than running it; positive where it is skipped.
        states: the states after the last layer, a pair of [columns, rows, hidden_size]. Column
            ``j`` is what the model hands to its head when it skips the best ``j`` layers.
        similarity: [columns, rows] float32, cosine of ``states`` to the target's, both less the centre.
        means: [num_layers, hidden_size] float32, the mean of ``x_i`` over the rows.
    """

    margins: Tensor
    states: State
    similarity: Tensor
    means: Tensor

    def mask(self, num_skipped: int | Tensor) -> Tensor:
        """Backtrack the set of layers to skip.

        Args:
            num_skipped: the budget, 0 <= budget < columns: one for all rows, or [rows] int64.

        Returns:
            [rows, num_layers] bool, True where the layer is skipped; each row holds exactly its
            budget of True.
        """
        return backtrack(self.margins > 0, num_skipped)


def backtrack(skipped: Tensor, num_skipped: int | Tensor) -> Tensor:
    """[num_layers, columns, rows] bool choices to the [rows, num_layers] bool mask of a budget."""
    num_layers, _, rows = skipped.shape
    if isinstance(num_skipped, int):  # made on the device: a copy would wait for it
        num_skipped = torch.full((rows,), num_skipped, device=skipped.device)
    column = num_skipped.view(1, rows)
    mask = torch.empty(rows, num_layers, dtype=torch.bool, device=skipped.device)
    for layer in reversed(range(num_layers)):
        skip = skipped[layer].gather(0, column)
        mask[:, layer] = skip[0]
        column = column - skip.long()
    return mask


def backtrack_all(skipped: Tensor, budgets: Tensor) -> Tensor:
    """[num_layers, columns, rows] choices to the [rows, budgets, num_layers] masks of [budgets] int64."""
    num_layers, _, rows = skipped.shape
    masks = backtrack(skipped.repeat(1, 1, len(budgets)), budgets.repeat_interleave(rows))
    return masks.view(len(budgets), rows, num_layers).transpose(0, 1)


def run_programme(
    state: State,
    layer: Layer,
    num_layers: int,
    max_skipped: int,
    prior: Tensor | None = None,
    memory: float = 0.0,
    centre: Tensor | None = None,
    reference: Tensor | None = None,
) -> Programme:
    """Run the programme for a batch of rows. Never synchronises with the host.

    Long, for the paper's loop is in one place.

    Args:
        state: ``x_0`` as a pair of [rows, hidden_size] tensors whose sum is the embedding.
        layer: ``layer(i, state)`` applies layer ``i`` to a pair of [columns * rows, hidden_size]
            tensors, column-major, and may overwrite them. ``columns`` grows from 1 to
            max_skipped + 1 with the layers, see ``columns_at``.
        num_layers: the number of layers L.
        max_skipped: the largest budget M, 0 <= M < L.
        prior: [num_layers, columns, rows] float32 margins of earlier tokens. A choice then goes by
            ``memory * prior + (1 - memory) * own``: a choice by one token alone is noisy (not in the paper).
        memory: see above; 0 <= memory < 1.
        centre: [num_layers, hidden_size] float32, subtracted from states before they are compared.
        reference: [num_layers, rows, hidden_size] float32, every ``x_i``, where ``layer`` is not the
            target's (not in the paper): column 0 is then a draft that skips nothing.

    Raises:
        ValueError: max_skipped is outside of [0, num_layers).
    """
    if not 0 <= max_skipped < num_layers:
        raise ValueError(f"max_skipped must be in [0, {num_layers}), got {max_skipped}")
    delta, residual = state
    rows, device = delta.shape[0], delta.device
    row, column = torch.arange(rows, device=device), torch.arange(max_skipped + 1, device=device)
    # After i layers no more than i can be skipped: the columns beyond hold what the last one does.
    forced = column > torch.arange(num_layers, device=device).unsqueeze(1)
    margins = torch.where(forced, 1.0, -1.0).unsqueeze(-1).repeat(1, 1, rows)
    means = delta.new_empty(num_layers, delta.shape[1], dtype=torch.float32)

    for i in range(num_layers):
        # A layer may work in place, and the columns are still needed as they are.
        ran = layer(i, (delta.clone(), residual.clone()))
        deltas, residuals = torch.cat((delta, ran[0])), torch.cat((residual, ran[1]))
        columns = columns_at(i, max_skipped)
        hidden = (deltas + residuals).view(2, columns, rows, -1).float()
        full = hidden[1, 0] if reference is None else reference[i]
        torch.mean(full, 0, out=means[i])
        if centre is not None:
            hidden, full = hidden - centre[i], full - centre[i]
        similarity = _cosine(hidden, full)

        # Column j is what it was and runs, or what column j - 1 was and skips.
        free = slice(1, min(i, columns - 1) + 1)
        margin = similarity[0, : free.stop - 1] - similarity[1, free]
        if prior is not None:
            margin = margin.lerp(prior[i, free], memory)
        margins[i, free] = margin
        after = column[: columns_at(i + 1, max_skipped)].unsqueeze(1)
        skip = margins[i, : len(after)] > 0
        # Rows of `deltas`: column j - 1 from before the layer, or column j from after it.
        before = (after - 1).clamp(0, columns - 1)
        source = torch.where(skip, before, columns + after.clamp(max=columns - 1))
        source = (source * rows + row).flatten()
        delta, residual = deltas.index_select(0, source), residuals.index_select(0, source)

    shape = max_skipped + 1, rows
    return Programme(
        margins,
        (delta.view(*shape, -1), residual.view(*shape, -1)),
        similarity.view(-1)[source].view(shape),
        means,
    )


def columns_at(layer: int, max_skipped: int) -> int:
    """How many columns go through a layer: those there can be by then, rounded up to a power of two.

    Rounding spares the caller a new batch size for every layer.
    """
    return min(1 << layer.bit_length(), max_skipped + 1)


def _cosine(hidden: Tensor, full: Tensor) -> Tensor:
    """[2, columns, rows] float32 cosine of [2, columns, rows, hidden_size] to [rows, hidden_size]."""
    norm: Tensor = torch.linalg.vector_norm(hidden, dim=-1) * torch.linalg.vector_norm(full, dim=-1)
    return (hidden * full).sum(-1) / norm.clamp(min=1e-30)
