"""What drafting costs in memory: no parameters, no KV layers; and what it gives back."""

import pytest
from engines import PROMPTS, drafter, engine_process, generate, model_runner, running

CLASP = {
    "method": "clasp",
    "adaptive": False,
    "num_speculative_tokens": 4,
    "num_skipped_layers": 10,
    "max_optimized_requests": 3,
}


def resources(speculative_config: object) -> dict:
    with running(speculative_config=speculative_config) as llm:
        runner = model_runner(llm)
        core = llm.llm_engine.engine_core.engine_core
        config = llm.llm_engine.vllm_config
        measured = {
            "parameters": sum(p.numel() for p in runner.model.parameters()),
            "layers": sorted(n for g in runner.kv_cache_config.kv_cache_groups for n in g.layer_names),
            "worker_blocks": runner.kv_cache_config.num_blocks,
            "scheduler_blocks": core.scheduler.kv_cache_manager.block_pool.num_gpu_blocks,
            "lookahead": core.scheduler.num_lookahead_tokens,
        }
        if speculative_config:
            ours = runner.speculator if hasattr(runner, "speculator") else runner.drafter
            measured["same_model"] = ours.model is runner.model
            measured["scratch"] = drafter(llm).passes.scratch._ids
            measured["compute_hash"] = config.speculative_config.compute_hash()
            generate(llm, PROMPTS[:6], max_tokens=8)
        measured["usage"] = core.scheduler.kv_cache_manager.usage
    return measured


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_no_parameters_and_no_kv_layers_of_its_own(runner):
    with engine_process(runner) as call:
        plain, clasp = call(resources, None), call(resources, CLASP)
    assert clasp["same_model"]
    assert clasp["parameters"] == plain["parameters"]
    assert clasp["layers"] == plain["layers"]
    assert clasp["worker_blocks"] == plain["worker_blocks"] == plain["scheduler_blocks"]
    assert clasp["scheduler_blocks"] == plain["scheduler_blocks"] - 3 * 10
    assert clasp["scratch"].min() == clasp["scheduler_blocks"]
    assert clasp["scratch"].max() == clasp["worker_blocks"] - 1
    assert clasp["lookahead"] == 4
    assert clasp["usage"] == 0
