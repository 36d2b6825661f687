"""The engine's own steps, as they are to be timed at start-up."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from clasp_vllm.control.costs import SIZES


def engine_steps(runner: Any) -> dict[int, Callable[[], None]]:
    """Replays of the target's CUDA graphs by their tokens, ascending; none where it has no full graphs.

    Elsewhere (on CPUs, with enforce_eager) a step of the engine is taken to be a pass like a draft's.
    """
    manager = getattr(runner, "cudagraph_manager", None)  # Model Runner V2's
    if manager is None:
        return {}
    uniform = (desc for desc in manager.graphs if desc.uniform_token_count is not None)
    # Of several with as many tokens that of the most requests: a step without drafts, where it is one.
    graphs = {desc.num_tokens: desc for desc in sorted(uniform, key=lambda desc: -desc.uniform_token_count)}
    sizes = sorted(graphs)
    timed = {next((size for size in sizes if size >= tokens), None) for tokens in SIZES}
    return {size: partial(manager.run_fullgraph, graphs[size]) for size in sizes if size in timed}
