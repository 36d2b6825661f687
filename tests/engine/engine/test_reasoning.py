"""Where reasoning ends inside a draft, what comes next is what plain vLLM gives."""

import pytest
from engines import PROMPTS, engine_process, running

CLASP = {
    "method": "clasp",
    "adaptive": False,
    "num_speculative_tokens": 5,
    "optimization_interval": 2,
    "draft_exit_threshold": 0.0,
}
START = "<"
PROSE = [*PROMPTS[7:10], "The house stood at the end of", '"I do not know," he']
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def register_parser(end: str) -> None:
    """Tell vLLM of a model that reasons up to a token of the demo model's."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.reasoning.basic_parsers import BaseThinkingReasoningParser

    class Parser(BaseThinkingReasoningParser):
        start_token, end_token = START, end

    ReasoningParserManager.register_module("demo", True, Parser)


def accepted(steps: list[int]) -> set[int]:
    """Places in an answer of the draft tokens that were accepted, so many in each step."""
    places, place = set(), 1
    for count in steps:
        places.update(range(place, place + count))
        place += count + 1
    return places


def reasoned(speculative_config: object) -> list[tuple[list[int], str, bool]]:
    """Of each prompt: the answer, what follows its first full stop, and whether that was a draft."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    register_parser(".")
    counting = {"per_request_spec_decode_metrics": "detailed"} if speculative_config else {}
    compact = {"backend": "xgrammar", "disable_any_whitespace": True}
    settings = {"reasoning_parser": "demo", "structured_outputs_config": compact} | counting
    answers = []
    with running(speculative_config=speculative_config, **settings) as llm:
        tokenizer = llm.get_tokenizer()
        (end,) = tokenizer.encode(".")
        grammar = StructuredOutputsParams(json=SCHEMA)
        params = SamplingParams(temperature=0.0, max_tokens=120, structured_outputs=grammar)
        for output in llm.generate(PROSE, params, use_tqdm=False):
            answer = output.outputs[0]
            tokens = list(answer.token_ids)
            place = tokens.index(end) if end in tokens else len(tokens)
            steps = answer.spec_decode_metrics.per_step_accepted if counting else []
            content = tokenizer.decode(tokens[place + 1 :], skip_special_tokens=True)
            answers.append((tokens, content, place in accepted(steps)))
    return answers


@pytest.mark.slow
def test_a_grammar_holds_from_the_end_of_reasoning_on():
    """vLLM issue 36138: it was not applied where drafts that end the reasoning are accepted."""
    with engine_process("v1") as call:
        plain, ours = (call(reasoned, config) for config in (None, CLASP))
    assert [tokens for tokens, *_ in ours] == [tokens for tokens, *_ in plain]
    contents = [content for _, content, drafted in ours if drafted]
    assert len(contents) > 1
    beginning = '{"name":"'  # as far as an answer got
    for content in contents:
        assert beginning.startswith(content.replace(" ", "")[: len(beginning)])
    assert any(content.endswith("}") for _, content, _ in ours)


BUDGETS = [50, 7, None, 0, 50, 5]  # the last begins to reason again and again


def budgeted(speculative_config: object) -> tuple[list[list[int]], list[int], list[int]]:
    """Answers to prompts that begin to reason, the draft tokens of each, and what ends reasoning."""
    from vllm import SamplingParams
    from vllm.config.reasoning import ReasoningConfig

    register_parser("~")
    settings = {"per_request_spec_decode_metrics": "summary"} if speculative_config else {}
    settings |= {"reasoning_parser": "demo", "reasoning_config": ReasoningConfig(reasoning_end_str="#@~")}
    with running(speculative_config=speculative_config, **settings) as llm:
        tokenizer = llm.get_tokenizer()
        (start,) = tokenizer.encode(START)
        prompts = [{"prompt_token_ids": [*tokenizer.encode(prompt), start]} for prompt in (*PROSE, PROSE[0])]
        params = [
            SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True, thinking_token_budget=budget)
            for budget in BUDGETS
        ]
        params[-1].logit_bias = {start: 100.0}
        answers = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
        counts = [answer.spec_decode_metrics for answer in answers]
        drafted = [0 if count is None else count.num_draft_tokens for count in counts]
        return [list(answer.token_ids) for answer in answers], drafted, tokenizer.encode("#@~")


@pytest.mark.parametrize("runner", ["v1", pytest.param("v2", marks=pytest.mark.slow)])
def test_reasoning_ends_with_its_budget(runner):
    """vLLM issue 39573: it went on. Beside a request without a budget, which alone has drafts."""
    with engine_process(runner) as call:
        plain, _, end = call(budgeted, None)
        ours, drafted, _ = call(budgeted, CLASP)
    assert ours == plain
    for budget, tokens, count in zip(BUDGETS, ours, drafted, strict=True):
        places = [place for place in range(len(tokens)) if tokens[place : place + len(end)] == end]
        if runner == "v1":  # plain V2 ends only some of them there
            assert places[:1] == ([] if budget is None else [budget])
        assert bool(count) == (budget is None)
    if runner == "v1":
        assert len(places) > 1
