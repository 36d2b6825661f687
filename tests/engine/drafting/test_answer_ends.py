"""Nothing is drafted that cannot get into an answer, where the host knows its tokens (V1 on a CPU)."""

import pytest
from engines import PROMPTS, Outcome, drafter, engine_process, generate, running

# Whatever it drafts is accepted.
NOTHING_SKIPPED = {
    "method": "layer_skip",
    "skip_layers": [],
    "num_speculative_tokens": 5,
    "draft_exit_threshold": 0.0,
}


@pytest.fixture(scope="module")
def call():
    with engine_process("v1") as call:
        yield call


def answers(all_params: list[dict]) -> list[tuple[int, int, int]]:
    """Of one answer after the other: tokens, draft tokens and draft steps."""
    counts = []
    with running(speculative_config=NOTHING_SKIPPED) as llm:
        total = drafter(llm).statistics.total
        for params in all_params:
            before = total.steps
            outcome = generate(llm, PROMPTS[:1], **params)
            counts.append((len(outcome.token_ids[0]), outcome.num_draft_tokens, total.steps - before))
    return counts


@pytest.mark.parametrize(
    ("max_tokens", "drafts"),
    # The prompt gives a token, each round those drafted and one more.
    [(1, 0), (2, 0), (3, 1), (7, 5), (8, 5), (9, 6), (13, 10)],
)
def test_the_last_drafts_are_as_long_as_the_answer(counts, max_tokens, drafts):
    assert counts[max_tokens] == (max_tokens, drafts, drafts)


@pytest.fixture(scope="module")
def counts(call):
    lengths = (1, 2, 3, 7, 8, 9, 13)
    return dict(zip(lengths, call(answers, [{"max_tokens": n} for n in lengths]), strict=True))


def stopped() -> tuple[Outcome, Outcome, int]:
    """An answer, the same up to a stop token that the target samples, and its draft steps after that one."""
    with running(speculative_config=NOTHING_SKIPPED) as llm:
        whole = generate(llm, PROMPTS[:1], max_tokens=40)
        stop = whole.token_ids[0][0]  # from the prompt
        before = drafter(llm).statistics.total.steps
        short = generate(llm, PROMPTS[:1], max_tokens=40, stop_token_ids=[stop])
        return whole, short, drafter(llm).statistics.total.steps - before


def test_nothing_is_drafted_after_a_stop_token(call):
    whole, short, steps = call(stopped)
    assert short.token_ids[0] == whole.token_ids[0][:1]
    assert steps == 0


def stopped_in_a_draft() -> tuple[Outcome, Outcome, int, int]:
    """An answer, the same up to a token that was drafted, the draft steps of that one, and its last index."""
    with running(speculative_config=NOTHING_SKIPPED) as llm:
        whole = generate(llm, PROMPTS[:1], max_tokens=40)
        tokens = whole.token_ids[0]
        # The prompt gives a token, each round the five drafted and one more.
        end = next(i for i, token in enumerate(tokens) if i % 6 in (2, 3) and token not in tokens[:i])
        before = drafter(llm).statistics.total.steps
        short = generate(llm, PROMPTS[:1], max_tokens=40, stop_token_ids=[tokens[end]])
        return whole, short, drafter(llm).statistics.total.steps - before, end


def test_a_draft_ends_with_a_stop_token(call):
    whole, short, steps, end = call(stopped_in_a_draft)
    assert short.token_ids[0] == whole.token_ids[0][: end + 1]
    assert short.num_draft_tokens == short.num_accepted_tokens == steps == end - (end - 1) // 6


def side_by_side(lengths: list[int], config: object) -> list[Outcome]:
    from vllm import SamplingParams

    with running(speculative_config=config) as llm:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
        outputs = llm.generate(PROMPTS[: len(lengths)], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


def test_answers_of_several_lengths(call):
    """Each row has room of its own."""
    lengths = [1, 2, 3, 5, 8, 13, 21, 34]
    got = call(side_by_side, lengths, NOTHING_SKIPPED)
    assert got == call(side_by_side, lengths, None)
    assert [len(tokens) for tokens in got] == lengths


def stopped_after_least_tokens() -> list[tuple[list[int], list[int]]]:
    """Answers that a stop token ends, by index, and the whole one up to there."""
    pairs = []
    with running(speculative_config=NOTHING_SKIPPED) as llm:
        (tokens,) = generate(llm, PROMPTS[:1], max_tokens=40).token_ids
        for end in (i for i in range(4, 20) if tokens[i] not in tokens[:i]):
            least = {"min_tokens": end - 1, "stop_token_ids": [tokens[end]]}
            (short,) = generate(llm, PROMPTS[:1], max_tokens=40, **least).token_ids
            pairs.append((short, tokens[: end + 1]))
    return pairs


def test_a_token_ends_the_answer_once_there_are_min_tokens(call):
    """Also where a round before it begins with fewer, and it is what the target adds to accepted drafts."""
    pairs = call(stopped_after_least_tokens)
    assert len(pairs) > 3
    assert all(short == whole for short, whole in pairs), pairs
