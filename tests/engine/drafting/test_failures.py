"""A failing drafter costs drafts, never an answer: its exceptions stay inside, logged once and counted."""

import logging

import pytest
from engines import PROMPTS, Outcome, drafter, engine_process, generate, model_runner, running

CLASP = {
    "method": "clasp",
    "adaptive": False,
    "num_speculative_tokens": 4,
    "optimization_interval": 2,
    "max_optimized_requests": 2,
    "draft_exit_threshold": 0.0,
}


class SabotageError(RuntimeError):
    """Raised in the middle of drafting."""


def fail_now_and_then(llm, every: int) -> None:
    """Let every so many-th sub-layer that is run for a draft or for the programme raise."""
    decoder = drafter(llm).decoder
    original, calls = decoder.run_sublayer, 0

    def run_sublayer(*args):
        nonlocal calls
        calls += 1
        if calls % every == 0:
            raise SabotageError(f"call {calls}")
        return original(*args)

    decoder.run_sublayer = run_sublayer


def sabotaged(settings: dict, every: int) -> tuple[Outcome, Outcome, float, list[str]]:
    """Outcomes with failures and afterwards without, the counter, and the log."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("vllm.clasp_vllm.engine.build").addHandler(handler)
    with running(speculative_config=CLASP | settings) as llm:
        fail_now_and_then(llm, every)
        bad = generate(llm, PROMPTS[:6], max_tokens=32)
        del drafter(llm).decoder.run_sublayer
        good = generate(llm, PROMPTS[:6], max_tokens=32)
        failures = next(m.value for m in llm.get_metrics() if m.name == "vllm:layer_skip_failures")
        assert failures == drafter(llm).statistics.total.failures
    return bad, good, failures, messages


def plain() -> Outcome:
    with running() as llm:
        return generate(llm, PROMPTS[:6], max_tokens=32)


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_failures_are_contained(runner):
    with engine_process(runner) as call:
        expected = call(plain)
        bad, good, failures, messages = call(sabotaged, {}, 331)
    assert bad.token_ids == expected.token_ids
    assert good.token_ids == expected.token_ids
    assert failures > 2
    assert bad.num_accepted_tokens > 0
    assert good.num_accepted_tokens > 0
    assert sum("this step goes without drafts" in message for message in messages) == 1


def test_a_drafter_that_always_fails():
    with engine_process("v1") as call:
        expected = call(plain)
        bad, good, failures, _ = call(sabotaged, {}, 1)
    assert bad.token_ids == good.token_ids == expected.token_ids
    assert bad.num_draft_tokens == 0
    assert failures > 10
    assert good.num_accepted_tokens > 0


def broken_start(settings: dict) -> None:
    """An engine whose layers cannot be called one by one."""
    from clasp_vllm.drafting.decoder import Decoder

    def run_sublayer(*args):
        raise SabotageError("at start-up")

    Decoder.run_sublayer = run_sublayer
    with running(speculative_config=CLASP | settings):
        pass


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_a_failure_at_start_up_ends_the_start(runner, adaptive):
    with engine_process(runner) as call, pytest.raises(SabotageError, match="at start-up"):
        call(broken_start, {"adaptive": adaptive})


def first_drafts_fail() -> None:
    """An engine that drafts while it warms up, as Model Runner V2 does on GPUs, and cannot."""
    from clasp_vllm.drafting.drafter import Drafter

    start = Drafter.start

    def warm_up_and_start(self, device, steps):
        self.draft(None, 4, None)
        start(self, device, steps)

    Drafter.start = warm_up_and_start
    with running(speculative_config=CLASP):
        pass


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_a_failure_in_the_warm_up_ends_the_start(runner):
    with engine_process(runner) as call, pytest.raises(TypeError):
        call(first_drafts_fail)


def allocate_too_much() -> None:
    """As real as it can be on a CPU: more than the address space has."""
    import torch

    torch.empty(1 << 50, dtype=torch.uint8)


def fail_at(llm, place: str, every: int) -> None:
    """Let memory be short in every so many-th call of a place of drafting."""
    from clasp_vllm.engine import draft_sampling_v1

    owner, name = {
        "draft pass": (drafter(llm).decoder, "run_sublayer"),
        "head": (drafter(llm).passes, "logits"),
        "choice of tokens": (model_runner(llm).drafter, "draw"),
        "probabilities": (draft_sampling_v1.DraftSampling, "distribution"),
        "lookup": (model_runner(llm).drafter, "_matches_of"),
    }[place]
    original, calls = getattr(owner, name), 0

    def short_of_memory(*args):
        nonlocal calls
        calls += 1
        if calls % every == 0:
            allocate_too_much()
        return original(*args)

    setattr(owner, name, short_of_memory)


def short_of_memory(place: str | None) -> tuple[list[list[int]], list[list[int]], float, int]:
    """Greedy and sampled answers, how many rounds failed, and how many drafts were accepted."""
    every = {"draft pass": 331, "head": 7, "choice of tokens": 7}.get(place, 3)
    config = CLASP | {"draft_sample_method": "probabilistic"}
    if place == "lookup":
        config |= {"adaptive": ["length"], "ngram_cascade": True}
    with running(speculative_config=config if place else None) as llm:
        if place:
            fail_at(llm, place, every)
        greedy = generate(llm, PROMPTS[:4], max_tokens=24)
        sampled = generate(llm, PROMPTS[:4], max_tokens=24, temperature=1.0)
        failures = drafter(llm).statistics.total.failures if place else 0
        return greedy.token_ids, sampled.token_ids, failures, greedy.num_accepted_tokens


@pytest.fixture(scope="module")
def plain_answers() -> list[list[int]]:
    with engine_process("v1") as call:
        return call(short_of_memory, None)[0]


@pytest.mark.parametrize("place", ["draft pass", "head", "choice of tokens", "probabilities", "lookup"])
def test_too_little_memory_costs_drafts(place, plain_answers):
    """Each answer is whole, and greedy ones are plain vLLM's."""
    with engine_process("v1") as call:
        greedy, sampled, failures, accepted = call(short_of_memory, place)
    assert greedy == plain_answers
    assert [len(tokens) for tokens in sampled] == [24] * 4
    assert failures > 2
    assert accepted > 0
