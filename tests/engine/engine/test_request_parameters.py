"""What vLLM refuses with other methods, and what a request may ask of us, all in one batch."""

import pytest
from engines import PROMPTS, engine_process, force_async_scheduling, running

CLASP = {"method": "clasp", "adaptive": False, "num_speculative_tokens": 4, "optimization_interval": 2}
BIAS = {token: (-1) ** token * 4.0 for token in range(256, 512)}
DECLINED = {"extra_args": {"layer_skip": False}}
SAMPLED = {"temperature": 1.0, "min_p": 0.05, "seed": 3}
REQUESTS = {
    "plain": (PROMPTS[0], {}),
    "bias": (PROMPTS[6], {"logit_bias": BIAS}),
    "declined": (PROMPTS[0], DECLINED),
    "declined, bias": (PROMPTS[6], DECLINED | {"logit_bias": BIAS}),
    "declined, sampled": (PROMPTS[6], DECLINED | SAMPLED),
    "declined, sampled, bias": (PROMPTS[9], DECLINED | SAMPLED | {"logit_bias": BIAS}),
    "wanted": (PROMPTS[2], {"extra_args": {"layer_skip": True}}),
}


def answers(speculative_config: object, asynchronous: bool, length: int) -> dict[str, tuple[list[int], int]]:
    """By request, its tokens and how many draft tokens were verified for it."""
    from vllm import SamplingParams

    if asynchronous:
        force_async_scheduling()
    counting = {"per_request_spec_decode_metrics": "summary"} if speculative_config else {}
    with running(speculative_config=speculative_config, **counting) as llm:
        prompts, settings = zip(*REQUESTS.values(), strict=True)
        defaults = {"temperature": 0.0, "max_tokens": length, "ignore_eos": True}
        params = [SamplingParams(**(defaults | given)) for given in settings]
        outputs = [output.outputs[0] for output in llm.generate(list(prompts), params, use_tqdm=False)]
    metrics = [output.spec_decode_metrics for output in outputs]
    drafted = [0 if counts is None else counts.to_dict()["num_draft_tokens"] for counts in metrics]
    tokens = [list(output.token_ids) for output in outputs]
    return dict(zip(REQUESTS, zip(tokens, drafted, strict=True), strict=True))


@pytest.fixture(
    scope="module",
    params=[
        ("v1", False),
        ("v1", True),
        pytest.param(("v2", False), marks=(pytest.mark.slow, pytest.mark.v2)),
        pytest.param(("v2", True), marks=(pytest.mark.slow, pytest.mark.v2)),
    ],
    ids=lambda kind: f"{kind[0]}-{'async' if kind[1] else 'sync'}",
)
def both(request) -> tuple[dict, dict]:
    runner, asynchronous = request.param
    length = 32 if runner == "v1" else 12  # which is interpreted
    with engine_process(runner) as call:
        plain, ours = (call(answers, spec, asynchronous, length) for spec in (None, CLASP))
    return plain, ours


@pytest.mark.parametrize("name", REQUESTS)
def test_answer_is_plain_vllms(both, name):
    """With a seed too, where there are no drafts."""
    plain, ours = both
    assert ours[name][0] == plain[name][0]


@pytest.mark.parametrize("name", REQUESTS)
def test_drafts_are_of_those_who_want_them(both, name):
    _, ours = both
    assert (ours[name][1] == 0) == name.startswith("declined")


def test_the_requests_do_what_they_say(both):
    plain, _ = both
    assert plain["bias"][0] != plain["declined, sampled"][0]
    assert plain["declined"][0] == plain["plain"][0]


LOGPROBS = [
    {"logprob_token_ids": [300, 5, 4000]},
    {"logprobs": 2},
    {},
    {"logprob_token_ids": [65], "logprobs": 1},
    DECLINED | {"logprob_token_ids": [7, 8]},
]


def logprobs(
    speculative_config: object, asynchronous: bool, at_once: bool, length: int
) -> tuple[list[list], int]:
    """Of requests that ask for logprobs in all ways: {token: logprob} of each token; and accepted drafts."""
    from vllm import SamplingParams

    if asynchronous:
        force_async_scheduling()
    with running(speculative_config=speculative_config) as llm:
        params = [
            SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, **of) for of in LOGPROBS
        ]
        prompts, outputs = PROMPTS[: len(params)], []
        for first, last in [(0, len(params))] if at_once else [(i, i + 1) for i in range(len(params))]:
            outputs += llm.generate(prompts[first:last], params[first:last], use_tqdm=False)
        accepted = sum(m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens")
    return [
        [
            {token: value.logprob for token, value in place.items()}
            for place in output.outputs[0].logprobs or ()
        ]
        for output in outputs
    ], accepted


@pytest.mark.parametrize(
    ("runner", "asynchronous"),
    [("v1", False), *(pytest.param(runner, True, marks=pytest.mark.slow) for runner in ("v1", "v2"))],
)
def test_logprobs_of_tokens_that_are_named(runner, asynchronous):
    """vLLM loses them with any speculation, and Model Runner V1 fails beside ordinary logprobs (PR 44727).

    Plain vLLM is asked one by one, for in a step with such a request it gives others their own token's alone,
    as it does here in steps without drafts.
    """
    length = 24 if runner == "v1" else 10
    with engine_process(runner) as call:
        plain, _ = call(logprobs, None, asynchronous, False, length)
        ours, accepted = call(logprobs, CLASP, asynchronous, True, length)
    assert accepted > 0
    assert [len(of_request) for of_request in ours] == [length, length, 0, length, length]
    for asked, mine, expected in zip(LOGPROBS, ours, plain, strict=True):
        if "logprob_token_ids" not in asked:
            mine, expected = ([dict([next(iter(place.items()))]) for place in of] for of in (mine, expected))
        assert mine == [pytest.approx(place, abs=1e-3) for place in expected]


def acceptance(speculative_config: object, level: str) -> tuple[list[float | None], float, float]:
    """The rates of acceptance in the answers, and of the metric's how many and their sum."""
    from vllm import SamplingParams

    with running(speculative_config=speculative_config, per_request_spec_decode_metrics=level) as llm:
        asked = [{}, {}, DECLINED, {"max_tokens": 1}]
        params = [SamplingParams(**({"temperature": 0.0, "max_tokens": 24} | of)) for of in asked]
        counts = [
            output.outputs[0].spec_decode_metrics
            for output in llm.generate(PROMPTS[: len(asked)], params, use_tqdm=False)
        ]
        name = "vllm:layer_skip_request_acceptance_rate"
        (metric,) = (metric for metric in llm.get_metrics() if metric.name == name)
    return [of and of.to_dict()["draft_acceptance_rate"] for of in counts], metric.count, metric.sum


def test_acceptance_by_request_is_a_metric():
    with engine_process("v1") as call:
        rates, count, total = call(acceptance, CLASP, "summary")
        hidden, count_hidden, total_hidden = call(acceptance, CLASP, "none")
    assert rates[2:] == [0, 0]
    assert min(rates[:2]) > 0
    assert (count, total) == (2, pytest.approx(sum(rates)))
    assert (hidden, count_hidden, total_hidden) == ([None] * 4, 2, pytest.approx(total))


def refusals(speculative_config: object) -> list[str]:
    """The errors of wrong requests, after each of which the engine goes on serving."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    messages = []
    with running(speculative_config=speculative_config) as llm:
        for extra_args in ({"layer_skip": "no"}, {"layer_skips": False}):
            with pytest.raises(VLLMValidationError) as error:
                llm.generate([PROMPTS[0]], SamplingParams(extra_args=extra_args), use_tqdm=False)
            messages.append(str(error.value))
            llm.generate([PROMPTS[0]], SamplingParams(max_tokens=2), use_tqdm=False)
    return messages


def test_wrong_parameters_are_refused():
    with engine_process("v1") as call:
        value, key = call(refusals, CLASP)
    assert "layer_skip='no' must be true or false" in value
    assert "layer_skips=False is not known; allowed is layer_skip" in key
