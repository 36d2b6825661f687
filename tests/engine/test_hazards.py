"""Where speculation that shares the target's KV cache could go wrong: output equal to plain vLLM's.

Each case runs all its batches on one engine, with CLaSp and without, greedy and in float32.
"""

import pytest
from engines import DEMO_MODEL, PROMPTS, engine_process, generate, running, tiny_llama

CLASP = {
    "method": "clasp",
    "adaptive": False,
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


def run(model: str, case: str, speculative_config: object) -> tuple[list, dict[str, float]]:
    """(tokens, text, why it ended) of every request, and some of the engine's counters."""
    from vllm import SamplingParams

    settings, batches = CASES[case]
    if "num_gpu_blocks_override" in settings and "tiny" in model:  # fewer layers, fewer scratch blocks
        settings = settings | {"num_gpu_blocks_override": 36}
    results = []
    with running(model, speculative_config, **settings) as llm:
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


def one_by_one(settings: dict) -> tuple[list[tuple], list[float], float]:
    """Overlapping prompts one after the other: outputs, draft tokens accepted for each, cache hits."""
    from vllm import SamplingParams

    def counter(llm, name: str) -> float:
        return sum(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")

    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    prompts = [LONG[:300], LONG[:300], LONG[:300] + PROMPTS[3], LONG[:200], LONG[:300]]
    results, accepted = [], []
    with running(speculative_config=CLASP, **BLOCK, **settings) as llm:
        for prompt in prompts:
            before = counter(llm, "spec_decode_num_accepted_tokens")
            output = llm.generate([prompt], params, use_tqdm=False)[0]
            results.append(tuple(output.outputs[0].token_ids))
            accepted.append(counter(llm, "spec_decode_num_accepted_tokens") - before)
        return results, accepted, counter(llm, "prefix_cache_hits")


def by_batch_size(speculative_config: object) -> tuple[list, float, float]:
    """Outputs of a batch that shrinks, the mean draft length, and drafts accepted."""
    with running(speculative_config=speculative_config, **BLOCK) as llm:
        outcomes = [generate(llm, PROMPTS[:count], max_tokens=32) for count in (8, 2, 1)]
    drafts = sum(o.num_drafts for o in outcomes) or 1
    return (
        [o.token_ids for o in outcomes],
        sum(o.num_draft_tokens for o in outcomes) / drafts,
        sum(o.num_accepted_tokens for o in outcomes),
    )


@pytest.fixture(scope="module", params=["v1", pytest.param("v2", marks=pytest.mark.slow)])
def call(request):
    with engine_process(request.param) as call:
        yield call


@pytest.fixture(scope="module", params=["demo", pytest.param("tiny", marks=pytest.mark.slow)])
def model(request, tmp_path_factory) -> str:
    return str(DEMO_MODEL if request.param == "demo" else tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize("case", CASES)
def test_output_is_plain_vllms(call, model, case):
    plain, _ = call(run, model, case, None)
    clasp, counters = call(run, model, case, CLASP)
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


@pytest.mark.parametrize(
    "case",
    [
        "preemption",
        "end of the context",
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("prefix caching", "chunked prefill")),
    ],
)
def test_output_is_plain_vllms_with_a_window(call, case):
    """Drafts that attend to the first block and 33 tokens."""
    plain, _ = call(run, str(DEMO_MODEL), case, None)
    clasp, counters = call(run, str(DEMO_MODEL), case, CLASP | {"draft_context": 33})
    assert clasp == plain
    assert counters["spec_decode_num_accepted_tokens"] > 0


def test_prefix_caching_leaves_acceptance_as_it_is(call):
    cached = call(one_by_one, {"enable_prefix_caching": True})
    fresh = call(one_by_one, {"enable_prefix_caching": False})
    assert cached[:2] == fresh[:2]
    assert min(cached[1]) > 0
    assert cached[2] > fresh[2] == 0


def test_draft_length_by_batch_size(call):
    plain, _, _ = call(by_batch_size, None)
    spec = CLASP | {"num_speculative_tokens_per_batch_size": [[1, 1, 5], [2, 4, 3], [5, 64, 1]]}
    clasp, length, accepted = call(by_batch_size, spec)
    assert clasp == plain
    assert 1 < length < 5
    assert accepted > 0
