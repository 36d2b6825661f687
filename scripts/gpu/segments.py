"""What draft steps, the head and the engine's own steps cost. Runs in the process of an engine."""

from __future__ import annotations

from typing import Any

from gpu.timing import host_milliseconds, milliseconds


def segments(llm: Any, rows: int) -> dict[str, Any]:
    """Milliseconds of a draft step of all and of half of the layers, by eager calls and by CUDA graphs."""
    import torch

    from clasp_vllm.drafting.batch import SequenceBatch
    from clasp_vllm.drafting.plans import Plan
    from clasp_vllm.tools import engine

    passes = engine.drafter(llm).passes
    num_layers = engine.drafter(llm).decoder.num_layers
    graphs = getattr(engine.proposer(llm), "graphs", None)
    attention, device = passes.attention, next(engine.model_runner(llm).model.parameters()).device
    results: dict[str, Any] = {"rows": rows, "graphs": 0 if graphs is None else graphs.num_graphs}
    with torch.inference_mode():
        tokens = torch.arange(rows, device=device) + 7
        positions = torch.full((rows,), attention.block_size - 1, dtype=torch.int64, device=device)
        table = torch.full((rows, 1), attention.scratch_block, dtype=torch.int32, device=device)
        lengths = torch.full((rows,), attention.block_size, dtype=torch.int32)
        batch = SequenceBatch([""] * rows, tokens, positions, table, lengths)
        masks = torch.zeros(rows, num_layers, 2, dtype=torch.bool, device=device)
        masks[::2] = True

        def plan(layers: int, mixed: bool = False) -> Plan:
            return Plan(
                [(i, part, mixed) for i in range(layers) for part in (0, 1)], masks if mixed else None
            )

        for layers in (num_layers, num_layers // 2):
            one = plan(layers)
            results[f"eager_{layers}"] = milliseconds(
                lambda one=one: passes.draft_step_eagerly(batch, one), 10
            )
            results[f"graphs_{layers}"] = milliseconds(lambda one=one: passes.draft_step(batch, one))
            results[f"graphs_{layers}_host"] = host_milliseconds(
                lambda one=one: passes.draft_step(batch, one)
            )
        if rows > 1:
            one = plan(num_layers, True)
            results[f"graphs_mixed_{num_layers}"] = milliseconds(lambda: passes.draft_step(batch, one))
        hidden = passes.draft_step(batch, plan(1)).clone()
        results["head"] = milliseconds(lambda: passes.head(hidden)[0].argmax(-1))
        results["head_eager"] = milliseconds(lambda: passes.head_eagerly(hidden)[0].argmax(-1))
        steps = getattr(engine.model_runner(llm), "cudagraph_manager", None)
        if steps is not None:
            from clasp_vllm.engine.steps import engine_steps

            results["engine_steps"] = {
                size: milliseconds(step, 10) for size, step in engine_steps(engine.model_runner(llm)).items()
            }
        if graphs is not None and rows > 1:
            results["mismatch"] = graphs.mismatch()
    return results
