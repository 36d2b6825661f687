"""Async scheduling: the next step is scheduled before the host knows this step's tokens.

vLLM switches it off on CPUs; here it is forced on. CPU operations are synchronous, so this tests the
scheduler's logic and that nothing trusts the host's counts, not the order of streams on a GPU.
"""

import pytest
from engines import (
    PROMPTS,
    Outcome,
    change_costs,
    drafter,
    engine_process,
    force_async_scheduling,
    generate,
    running,
)

CLASP = {
    "method": "clasp",
    "adaptive": False,
    "num_speculative_tokens": 4,
    "optimization_interval": 2,
    "max_optimized_requests": 2,
    "draft_exit_threshold": 0.3,
}
LONG = " ".join(PROMPTS)[:500]


def outcomes(speculative_config: object) -> tuple[list[Outcome], float]:
    """Chunked prefill, more requests than fit at once, early ends, and slots taken over; then usage."""
    force_async_scheduling()
    settings = {"max_num_batched_tokens": 64, "max_num_seqs": 6, "block_size": 32}
    with running(speculative_config=speculative_config, **settings) as llm:
        core = llm.llm_engine.engine_core.engine_core
        assert type(core.scheduler).__name__ == "AsyncScheduler"
        if speculative_config and speculative_config["adaptive"]:
            change_costs(llm)
        generated = [
            generate(llm, [*PROMPTS[:9], LONG], max_tokens=40),
            generate(llm, [LONG, *PROMPTS[8:12]], max_tokens=30, ignore_eos=False, stop=["\n"]),
        ]
        if speculative_config:  # what is counted in the worker arrives
            rounds = next(m.value for m in llm.get_metrics() if m.name == "vllm:layer_skip_rounds")
            total = drafter(llm).statistics.total.rounds
            assert total - 2 <= rounds <= total, (rounds, total)  # the last step's output is not waited for
            assert (drafter(llm).statistics.total.plain_steps > 0) == speculative_config["adaptive"]
        return generated, core.scheduler.kv_cache_manager.usage


@pytest.mark.parametrize("adaptive", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("runner", ["v1", pytest.param("v2", marks=pytest.mark.slow)])
def test_output_is_plain_vllms(runner, adaptive):
    """With the controller too, switching on and off: draft lengths that the scheduler hears of late."""
    with engine_process(runner) as call:
        plain, _ = call(outcomes, None)
        clasp, usage = call(outcomes, CLASP | {"adaptive": adaptive})
    assert [o.token_ids for o in clasp] == [o.token_ids for o in plain]
    assert [o.texts for o in clasp] == [o.texts for o in plain]
    assert all(outcome.num_accepted_tokens > 0 for outcome in clasp)
    assert usage == 0
