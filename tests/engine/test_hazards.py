"""Where speculation that shares the target's KV cache could go wrong: output equal to plain vLLM's.

Each case runs all its batches on one engine, with CLaSp and without, greedy and in float32.
"""

import pytest
from engines import PROMPTS, engine_process, running

CLASP = {
    "method": "clasp",
    "num_speculative_tokens": 5,
    "optimization_interval": 3,
    "max_optimized_requests": 2,
    "draft_exit_threshold": 0.0,
}
LONG = " ".join(PROMPTS)
BLOCK = {"block_size": 32}

# Engine settings, and batches of (prompts, sampling parameters): one set for all or one for each prompt.
CASES = {
    "prefix caching": (
        BLOCK,
        [
            ([*PROMPTS[:6], LONG[:400]], {}),
            ([*PROMPTS[:6], LONG[:400], LONG[:300] + PROMPTS[9]], {}),
            ([LONG[:400] + PROMPTS[8], LONG[:400]], {}),
        ],
    ),
    "no prefix caching": (BLOCK | {"enable_prefix_caching": False}, [(PROMPTS[:6], {})] * 2),
    "large blocks": ({"block_size": 128}, [([*PROMPTS[:4], LONG[:500]], {})]),
    "chunked prefill": (
        BLOCK | {"max_num_batched_tokens": 48, "max_num_seqs": 8},
        [([LONG[:600], *PROMPTS[:5], LONG[200:900]], {})],
    ),
    "preemption": (
        BLOCK | {"num_gpu_blocks_override": 54, "max_num_seqs": 12},
        [(PROMPTS[:12], {"max_tokens": 96})],
    ),
    "end of the context": (
        BLOCK | {"max_model_len": 96},
        [(PROMPTS[:8], {"max_tokens": 300}), (PROMPTS[8:12], {"max_tokens": 300})],
    ),
    "endings": (
        BLOCK,
        [
            (
                PROMPTS[:8],
                [
                    {"max_tokens": 1},
                    {"max_tokens": 2},
                    {"stop": ["\n"]},
                    {"stop": ["e"], "include_stop_str_in_output": True},
                    {"ignore_eos": False, "max_tokens": 150},
                    {"ignore_eos": False, "min_tokens": 40, "max_tokens": 80},
                    {"stop_token_ids": list(range(300, 700))},
                    {"max_tokens": 7},
                ],
            )
        ],
    ),
    "reused slots": (
        BLOCK | {"max_num_seqs": 3},
        [(PROMPTS[:10], [{"max_tokens": 5 + 7 * (i % 5)} for i in range(10)])],
    ),
}


def run(case: str, speculative_config: object) -> tuple[list, dict[str, float]]:
    """(tokens, text, why it ended) of every request, and some of the engine's counters."""
    from vllm import SamplingParams

    settings, batches = CASES[case]
    results = []
    with running(speculative_config=speculative_config, **settings) as llm:
        for prompts, sampling in batches:
            each = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
            params = [
                SamplingParams(**({"temperature": 0.0, "max_tokens": 48, "ignore_eos": True} | own))
                for own in each
            ]
            for output in llm.generate(list(prompts), params, use_tqdm=False):
                completion = output.outputs[0]
                results.append((tuple(completion.token_ids), completion.text, completion.finish_reason))
        counters = {m.name.removeprefix("vllm:"): m.value for m in llm.get_metrics() if hasattr(m, "value")}
        usage = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.usage
    return results, counters | {"usage": usage}


@pytest.fixture(scope="module", params=["v1", pytest.param("v2", marks=pytest.mark.slow)])
def call(request):
    with engine_process(request.param) as call:
        yield call


@pytest.mark.parametrize("case", CASES)
def test_output_is_plain_vllms(call, case):
    plain, _ = call(run, case, None)
    clasp, counters = call(run, case, CLASP)
    assert clasp == plain
    assert counters["spec_decode_num_accepted_tokens"] > 0
    assert counters["usage"] == 0
    if case == "prefix caching":
        assert counters["prefix_cache_hits"] > 0
    if case == "preemption":
        assert counters["num_preemptions"] > 0
    if case == "end of the context":
        assert {reason for _, _, reason in clasp} == {"length"}
    if case == "endings":
        assert {reason for _, _, reason in clasp} == {"length", "stop"}
