"""The output with CLaSp is plain vLLM's, token for token, and acceptance is what the method promises."""

import random

import pytest
from engines import PROMPTS, Outcome, drafter, engine_process, generate, running

HALF = {
    "method": "clasp",
    "adaptive": False,
    "num_speculative_tokens": 5,
    "optimization_interval": 4,
    "draft_exit_threshold": 0.0,
}


def outcome(speculative_config: object, **settings) -> Outcome:
    with running(speculative_config=speculative_config, **settings) as llm:
        return generate(llm, PROMPTS)


@pytest.fixture(scope="module", params=["v1", "v2"])
def call(request):
    with engine_process(request.param) as call:
        yield call


@pytest.fixture(scope="module")
def plain(call) -> Outcome:
    return call(outcome, None)


@pytest.fixture(scope="module")
def clasp(call) -> Outcome:
    return call(outcome, HALF)


def test_greedy_output_is_identical(plain, clasp):
    assert len(PROMPTS) >= 16
    assert all(len(ids) == 64 for ids in plain.token_ids)
    assert clasp.token_ids == plain.token_ids
    assert 4.5 * clasp.num_drafts < clasp.num_draft_tokens <= 5 * clasp.num_drafts  # fewer at an answer's end


def test_output_varies(plain):
    """An identity test proves little on output that is one token repeated."""
    assert len({tuple(ids) for ids in plain.token_ids}) == len(PROMPTS)
    assert sum(len(set(ids)) for ids in plain.token_ids) / len(PROMPTS) > 8


@pytest.mark.slow_on_v2
def test_empty_skip_set_is_always_accepted(call, plain):
    got = call(
        outcome,
        {"method": "layer_skip", "skip_layers": [], "num_speculative_tokens": 5, "draft_exit_threshold": 0.0},
    )
    assert got.token_ids == plain.token_ids
    assert got.num_accepted_tokens == got.num_draft_tokens > 0


def test_first_draft_of_an_optimising_round_is_always_accepted(call, plain):
    got = call(outcome, HALF | {"optimization_interval": 1, "max_optimized_requests": 16})
    assert got.token_ids == plain.token_ids
    assert got.accepted_per_position[0] == got.num_drafts > 0


@pytest.mark.slow_on_v2
def test_chosen_layers_beat_random_ones(call, clasp):
    """Half the layers skipped: CLaSp's choice against a random one, at the positions both draft."""
    skip_layers = random.Random(0).sample(range(24), 12)
    got = call(
        outcome,
        {
            "method": "layer_skip",
            "skip_layers": skip_layers,
            "num_speculative_tokens": 5,
            "draft_exit_threshold": 0.0,
        },
    )
    assert got.num_drafts > 0
    mean = got.num_accepted_tokens / got.num_drafts
    assert clasp.num_accepted_tokens / clasp.num_drafts > 2 * mean


def draft_steps(speculative_config: object) -> tuple[Outcome, int]:
    with running(speculative_config=speculative_config) as llm:
        return generate(llm, PROMPTS[:4]), drafter(llm).statistics.total.steps


@pytest.mark.slow_on_v2
def test_early_exit_is_lossless_and_drafts_less(call, plain):
    every, steps = call(draft_steps, HALF)
    early, early_steps = call(draft_steps, HALF | {"draft_exit_threshold": 0.9})
    assert every.token_ids == early.token_ids == plain.token_ids[:4]
    assert early_steps / early.num_drafts < 0.9 * steps / every.num_drafts


def mixed_batch(speculative_config: object) -> list[list[int]]:
    """Greedy requests that share their batch with sampled ones.

    With the temperature alone: the interpreter cannot run V2's top-k and top-p kernels, in plain vLLM too.
    """
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    sampled = [SamplingParams(temperature=1.0, seed=seed, max_tokens=24) for seed in range(4)]
    with running(speculative_config=speculative_config) as llm:
        outputs = llm.generate(PROMPTS[:4] + PROMPTS[:4], [greedy] * 4 + sampled, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


def test_greedy_requests_beside_sampled_ones(call, plain):
    got = call(mixed_batch, HALF)
    assert got[:4] == [ids[:32] for ids in plain.token_ids[:4]]
    assert len({tuple(ids) for ids in got}) == 8


@pytest.mark.slow
def test_torch_compile():
    """The target compiled, the draft's layers called one by one, in float32."""
    with engine_process("v1") as call:
        plain = call(outcome, None, enforce_eager=False)
        clasp = call(outcome, HALF, enforce_eager=False)
    assert clasp.token_ids == plain.token_ids
    assert clasp.num_accepted_tokens > 0


def common_prefix(a: Outcome, b: Outcome) -> float:
    """Mean share of tokens before two outcomes first differ."""
    shares = []
    for one, other in zip(a.token_ids, b.token_ids, strict=True):
        equal = [x == y for x, y in zip(one, other, strict=True)]
        shares.append(equal.index(False) / len(equal) if False in equal else 1.0)
    return sum(shares) / len(shares)


def alone(speculative_config: object, **settings) -> Outcome:
    """Each prompt in a batch of its own."""
    with running(speculative_config=speculative_config, **settings) as llm:
        return Outcome([generate(llm, [prompt]).token_ids[0] for prompt in PROMPTS], [])


@pytest.mark.slow
def test_bfloat16_differs_no_more_than_plain_vllm_from_itself():
    """In bfloat16 rounding depends on the batch: the floor is plain vLLM in other batches (see -s)."""
    with engine_process("v1") as call:
        batch, single = (call(run, None, dtype="bfloat16") for run in (outcome, alone))
        clasp = call(outcome, HALF, dtype="bfloat16")
    floor, ours = common_prefix(batch, single), common_prefix(batch, clasp)
    print(
        f"\nbfloat16, share of {len(PROMPTS)} x 64 tokens before the first difference: plain vLLM in "
        f"a batch and alone {floor:.3f}, plain vLLM and CLaSp in a batch {ours:.3f}"
    )
    assert ours > floor - 0.1


def calls_for_drafts(speculative_config: object) -> tuple[Outcome, int]:
    """What was generated, and how often the engine asked the workers for drafts in a call of its own."""
    with running(speculative_config=speculative_config, max_num_seqs=8) as llm:
        executor = llm.llm_engine.engine_core.engine_core.model_executor
        original, calls = executor.take_draft_token_ids, []
        executor.take_draft_token_ids = lambda: (calls.append(1), original())[1]
        return generate(llm, PROMPTS[:4], max_tokens=16), len(calls)


def test_drafts_come_with_the_output_where_they_can(call, plain, request):
    half, calls = call(calls_for_drafts, HALF)
    assert half.num_accepted_tokens > 0
    assert [ids[:16] for ids in plain.token_ids[:4]] == half.token_ids
    assert (calls == 0) == ("[v1]" in request.node.name)
