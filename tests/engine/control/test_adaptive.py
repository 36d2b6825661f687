"""The controller in the engine: lossless whatever it chooses, off when it says so, nothing left behind."""

import pytest
from engines import (
    PROMPTS,
    REPEATING,
    Outcome,
    change_costs,
    drafter,
    engine_process,
    generate,
    look_up,
    running,
)

CLASP = {
    "method": "clasp",
    "num_speculative_tokens": 4,
    "max_optimized_requests": 1,
    # vLLM's n-gram lookup loads numba, after which vLLM starts no further engine in the same process.
    "ngram_cascade": False,
}
SETTINGS = {"max_num_seqs": 8}


def plain_outcome() -> Outcome:
    with running(**SETTINGS) as llm:
        return generate(llm, PROMPTS[:10], max_tokens=32)


def adaptive_outcome(config: dict) -> tuple[Outcome, list[tuple]]:
    """What was generated and what was chosen, with a controller whose costs change as it serves."""
    with running(speculative_config=config, **SETTINGS) as llm:
        chosen = change_costs(llm)
        outcome = generate(llm, PROMPTS[:10], max_tokens=32)
    return outcome, [(dear, choice.length, choice.budget) for dear, choice in chosen]


@pytest.fixture(scope="module", params=["v1", "v2"])
def call(request):
    with engine_process(request.param) as call:
        yield call


@pytest.fixture(scope="module")
def plain(call) -> Outcome:
    return call(plain_outcome)


def test_switching_on_and_off_in_the_middle_of_requests(call, plain):
    outcome, chosen = call(adaptive_outcome, CLASP)
    assert outcome.token_ids == plain.token_ids
    assert outcome.num_accepted_tokens > 0
    lengths = {dear: [length for d, length, _ in chosen if d == dear] for dear in (False, True)}
    assert max(lengths[False]) > 0
    # Considered again every few steps, and speculation that was under way ends first.
    assert lengths[True].count(0) > len(lengths[True]) / 2
    assert len({budget for _, length, budget in chosen if length}) > 1


def with_odd_settings(configs: list[dict]) -> list[list[list[int]]]:
    token_ids = []
    for config in configs:
        with running(speculative_config=config, max_num_seqs=1) as llm:
            change_costs(llm, every=3)
            token_ids.append(generate(llm, PROMPTS[:2], max_tokens=24).token_ids)
    return token_ids


def test_nothing_to_choose_from():
    """No layer to skip, one draft token, one sequence, no memory, fixed masks."""
    few = {"num_speculative_tokens": 1, "ngram_cascade": False}
    configs = [
        {"method": "clasp", "num_skipped_layers": 0} | few,
        {"method": "clasp", "mask_memory": 0.0} | few,
        {"method": "layer_skip", "adaptive": True, "skip_layers": [3]} | few,
    ]
    with engine_process("v1") as call:
        plain = call(plain_outcome).token_ids
        for token_ids in call(with_odd_settings, configs):
            assert token_ids == [ids[:24] for ids in plain[:2]]


def never_drafting(config: object) -> tuple[list[list[int]], int]:
    """What requests with seeds sample, and how many steps went through vLLM's rejection sampler."""
    import vllm.v1.sample.rejection_sampler as module
    from vllm import SamplingParams

    steps, original = 0, module.rejection_sample

    def rejection_sample(*args, **kwargs):
        nonlocal steps
        steps += 1
        return original(*args, **kwargs)

    with running(speculative_config=config, **SETTINGS) as llm:
        if config:
            controller = drafter(llm).controller
            controller.gate.affords, controller.gate.probes.due = lambda *_: False, lambda *_: False
        module.rejection_sample = rejection_sample
        try:
            params = [
                SamplingParams(temperature=1.0, seed=seed, max_tokens=40, ignore_eos=True)
                for seed in range(6)
            ]
            outputs = llm.generate(PROMPTS[:6], params, use_tqdm=False)
        finally:
            module.rejection_sample = original
        return [list(output.outputs[0].token_ids) for output in outputs], steps


def test_off_is_plain_vllm():
    """Even what seeds give: steps without drafts are sampled as if there was no speculation."""
    with engine_process("v1") as call:
        plain, _ = call(never_drafting, None)
        ours, steps = call(never_drafting, CLASP)
    assert ours == plain
    assert steps == 0


def looked_up(config: object, how: str = "as they are", tokens: int = 48) -> tuple[Outcome, int, list[bool]]:
    """Text that repeats itself beside text that does not, greedy and sampled: with drafts looked up.

    Returns what was generated, how many drafts were looked up, and of each round whether there were drafts by
    skipping beside them.
    """
    from vllm import SamplingParams

    with running(speculative_config=config, **SETTINGS) as llm:
        both = look_up(llm, how) if config else []
        outcome = generate(
            llm, [REPEATING, PROMPTS[3], REPEATING + PROMPTS[6], PROMPTS[10]], max_tokens=tokens
        )
        params = SamplingParams(temperature=1.0, max_tokens=tokens // 2, ignore_eos=True)
        sampled = llm.generate([REPEATING] * 4, params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == tokens // 2 for output in sampled)
        total = drafter(llm).statistics.total if config else None
        return outcome, total.ngrams if total else 0, both


def test_drafts_looked_up_in_the_context():
    with engine_process("v1") as call:
        plain, *_ = call(looked_up, None)
        without, num_ngrams_without, *_ = call(looked_up, CLASP)
        cascade, num_ngrams, _ = call(looked_up, CLASP | {"ngram_cascade": True})
    assert cascade.token_ids == without.token_ids == plain.token_ids
    assert num_ngrams > 10
    assert num_ngrams_without == 0
    assert cascade.num_accepted_tokens > 0


@pytest.mark.v2
def test_drafts_looked_up_where_tokens_are_on_the_device():
    """Model Runner V2, where the host knows the matches a round late; beside drafts that are drawn."""
    config = CLASP | {"ngram_cascade": True, "prompt_lookup_min": 1, "draft_sample_method": "probabilistic"}
    with engine_process("v2") as call:
        plain, *_ = call(looked_up, None, "", 24)
        cascade, num_ngrams, both = call(looked_up, config, "beside", 24)
    assert cascade.token_ids == plain.token_ids
    assert num_ngrams > 10
    assert sum(both) > 3
    assert cascade.num_accepted_tokens > 0


def left_over(config: dict) -> tuple[int, int, int]:
    """Slots, plans and remembered drafts after more requests than fit at once, and the capacity."""
    with running(speculative_config=config, max_num_seqs=2) as llm:
        ours = drafter(llm)
        generate(llm, PROMPTS[:8], max_tokens=8)
        return (
            len(ours.sequences),
            len(ours.controller.evidence.drafts.offset),
            len(ours.controller.corrections._pending),
        )


def test_nothing_is_kept_of_finished_requests():
    with engine_process("v1") as call:
        slots, offsets, pending = call(left_over, CLASP)
    assert slots == offsets == 2
    assert pending < 8


def off_from_the_start(config: dict) -> tuple[Outcome, dict[str, float], list[str]]:
    """With drafts that could never pay: what was generated, our metrics, and what the controller said."""
    from clasp_vllm.control.choice_log import ChoiceLog

    with running(speculative_config=config, **SETTINGS) as llm:
        ours = drafter(llm)
        ours.controller.corrections.scales["draft_scale"][:] = 1e9
        lines: list[str] = []
        ours.controller._log = ChoiceLog(lines.append, ours.controller._num_layers)
        outcome = generate(llm, PROMPTS[:10], max_tokens=32)
        prefix = "vllm:layer_skip_"
        metrics = {
            metric.name.removeprefix(prefix): metric.value
            for metric in llm.get_metrics()
            if metric.name.startswith(prefix) and hasattr(metric, "value")
        }
        return outcome, metrics, lines


def test_off_means_off(call, plain):
    """Not one draft step, not one optimisation pass, and nothing verified but room made before it was off."""
    outcome, metrics, lines = call(off_from_the_start, CLASP)
    assert outcome.token_ids == plain.token_ids
    assert metrics["rounds"] == metrics["steps"] == metrics["optimized"] == 0
    assert metrics["plain_steps"] >= 32
    assert metrics["draft_length"] == metrics["cuda_graphs"] == 0
    assert metrics["expected_ratio"] < 1
    assert "off; best: " in lines[0]
    assert outcome.num_accepted_tokens == 0
    assert outcome.num_draft_tokens <= 8 * 4
