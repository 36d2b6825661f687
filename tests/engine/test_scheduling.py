"""However vLLM's scheduler shares its steps between requests, the output is plain vLLM's."""

from __future__ import annotations

from typing import Any

import pytest
from engines import PROMPTS, engine_process, generate, running

DRAFTED = 5
CLASP = {
    "method": "clasp",
    "adaptive": False,
    "num_speculative_tokens": DRAFTED,
    "optimization_interval": 2,
    "max_optimized_requests": 2,
    "draft_exit_threshold": 0.0,
}
LONG = " ".join(PROMPTS)
LIMITS: dict[str, dict[str, Any]] = {
    "one request at a time": {"max_num_seqs": 1},
    "less room than drafts": {"max_num_seqs": 8, "max_num_batched_tokens": 16},
    "long prompts in parts": {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "long_prefill_token_threshold": 24,
    },
}


def watch_steps(llm: Any) -> list[dict[str, int]]:
    """A list that grows with each step's tokens by request."""
    steps: list[dict[str, int]] = []
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    original = scheduler.schedule

    def schedule(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if output.num_scheduled_tokens:
            steps.append(dict(output.num_scheduled_tokens))
        return output

    scheduler.schedule = schedule
    return steps


def limited(settings: dict[str, Any], speculative_config: object) -> tuple[list, int, list[dict[str, int]]]:
    """The answers, draft tokens accepted, and the steps."""
    with running(speculative_config=speculative_config, block_size=32, **settings) as llm:
        steps = watch_steps(llm)
        outcome = generate(llm, [LONG[:500], *PROMPTS[:8], LONG[300:700]], max_tokens=32)
        return outcome.token_ids, outcome.num_accepted_tokens, steps


@pytest.fixture(scope="module", params=["v1", pytest.param("v2", marks=pytest.mark.slow)])
def call(request):
    with engine_process(request.param) as call:
        yield call


@pytest.fixture(scope="module")
def plain(call) -> list[list[int]]:
    return call(limited, {}, None)[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", LIMITS)
def test_output_is_plain_vllms(call, plain, case):
    """Which has no such limits."""
    limits = LIMITS[case]
    clasp, accepted, steps = call(limited, limits, CLASP)
    assert clasp == plain
    assert accepted > 0
    assert max(map(len, steps)) <= limits["max_num_seqs"]
    if "long_prefill_token_threshold" in limits:  # longer than any draft
        assert max(max(step.values()) for step in steps) == limits["long_prefill_token_threshold"]
    elif "max_num_batched_tokens" in limits:
        room = limits["max_num_batched_tokens"]
        assert max(sum(step.values()) for step in steps) == room < limits["max_num_seqs"] * (1 + DRAFTED)


def joining() -> list[list[int]]:
    """Drafts as scheduled, of requests that come later with all but a token of their prompts cached."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True)
    scheduled: list[list[int]] = []
    with running(speculative_config=CLASP, block_size=32, enable_prefix_caching=True) as llm:
        engine = llm.llm_engine
        prompt = {"prompt_token_ids": llm.get_tokenizer().encode(LONG)[:65]}  # two blocks and a token
        scheduler = engine.engine_core.engine_core.scheduler
        original = scheduler.schedule

        def schedule(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            scheduled.extend(output.scheduled_spec_decode_tokens.values())
            return output

        scheduler.schedule = schedule
        for name in "abc":
            engine.add_request(name, prompt, params)
            for _ in range(4):
                engine.step()
        while engine.has_unfinished_requests():
            engine.step()
    return scheduled


def test_new_requests_are_not_padded_with_drafts():
    """vLLM's are -1, and its CPU kernel for rejection reads the probability of that token."""
    with engine_process("v1") as call:
        scheduled = call(joining)
    assert len(scheduled) > 10
    assert all(token >= 0 for drafts in scheduled for token in drafts)


URGENT_LAST = [11, 3, 9, 5, 1, 10, 4, 8, 2, 7, 0, 6]  # priorities; the least comes first


def prioritised(speculative_config: object) -> tuple[list[list[int]], list[int], set[int]]:
    """The answers, priorities in the order of first tokens, and those whose requests were preempted."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=96, ignore_eos=True)
    settings = {"num_gpu_blocks_override": 54, "max_num_seqs": 8, "block_size": 32}
    answers: dict[int, list[int]] = {}
    order: list[int] = []
    preempted: set[int] = set()
    with running(speculative_config=speculative_config, scheduling_policy="priority", **settings) as llm:
        engine = llm.llm_engine
        scheduler = engine.engine_core.engine_core.scheduler
        for priority, prompt in zip(URGENT_LAST, PROMPTS, strict=False):
            engine.add_request(str(priority), prompt, params, priority=priority)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            preempted.update(r.priority for r in scheduler.requests.values() if r.num_preemptions)
            for output in outputs:
                priority, tokens = int(output.request_id), list(output.outputs[0].token_ids)
                if tokens and priority not in order:
                    order.append(priority)
                answers[priority] = tokens
    return [answers[priority] for priority in URGENT_LAST], order, preempted


@pytest.mark.slow
def test_priorities(call):
    """Without room for all the least urgent is preempted, drafts or not, and nothing else changes."""
    plain, plain_order, _ = call(prioritised, None)
    clasp, order, preempted = call(prioritised, CLASP)
    assert clasp == plain
    assert set(order[:8]) == set(plain_order[:8]) == set(range(8))
    assert order[8:] == plain_order[8:] == [8, 9, 10, 11]
    assert preempted
    assert min(preempted) > 1


EMBEDDED = {"enable_prompt_embeds": True, "max_num_seqs": 8, "max_num_batched_tokens": 64}


def embedded(speculative_config: object) -> tuple[list[list[int]], list[list[int]], int]:
    """Answers to prompts' embeddings, beside the same prompts as text; draft tokens accepted."""
    from engines import model_runner

    with running(speculative_config=speculative_config, block_size=32, **EMBEDDED) as llm:
        import torch

        embedding, encode = model_runner(llm).model.model.embed_tokens, llm.get_tokenizer().encode
        texts = [LONG[:400], *PROMPTS[:6]]
        with torch.inference_mode():
            vectors = [embedding(torch.tensor(encode(text))).clone() for text in texts]
        prompts = [each for pair in zip(texts, vectors, strict=True) for each in pair]
        outcome = generate(
            llm,
            [each if isinstance(each, str) else {"prompt_embeds": each} for each in prompts],
            max_tokens=40,
        )
        return outcome.token_ids[1::2], outcome.token_ids[::2], outcome.num_accepted_tokens


def test_prompt_embeddings(call):
    plain, _, _ = call(embedded, None)
    of_vectors, of_texts, accepted = call(embedded, CLASP)
    assert of_vectors == plain
    assert of_vectors == of_texts
    assert accepted > 0
