"""The programme of CLaSp in its smallest readable form: the oracle of the tests.

One token, one state per cell, no batching: Algorithm 1 of arXiv 2505.24196 with its indices put
right (``x_i`` is the state *after* layer ``i``, and the similarity is maximised).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, cosine_similarity


def best_skip_set(
    x0: Tensor,
    layers: Sequence[Callable[[Tensor], Tensor]],
    num_skipped: int,
    centre: Sequence[Tensor] | None = None,
    reference: Sequence[Tensor] | None = None,
) -> tuple[frozenset[int], Tensor]:
    """The layers to skip, and the hidden state that skipping them gives.

    Args:
        x0: [hidden_size], the embedding of the token.
        layers: the layers, each from [hidden_size] to [hidden_size].
        num_skipped: the budget M.
        centre: [layers] of [hidden_size], subtracted from states before they are compared.
        reference: [layers] of [hidden_size], the target's states, where ``layers`` are not the target's.
    """
    x = x0
    g: dict[int, tuple[Tensor, frozenset[int]]] = {0: (x0, frozenset())}
    for i, layer in enumerate(layers):
        x = layer(x) if reference is None else reference[i]
        origin = 0.0 if centre is None else centre[i]
        new = {}
        for j in range(num_skipped + 1):
            candidates = []
            if j in g:
                candidates.append((layer(g[j][0]), g[j][1]))
            if j - 1 in g:
                candidates.append((g[j - 1][0], g[j - 1][1] | {i}))
            if candidates:
                new[j] = max(
                    candidates, key=lambda c: float(cosine_similarity(c[0] - origin, x - origin, dim=-1))
                )
        g = new
    state, skipped = g[num_skipped]
    return skipped, state
