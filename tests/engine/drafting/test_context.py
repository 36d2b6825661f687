"""Drafts that attend to a part of the cache: plain vLLM's output, and the drafts of an independent mask."""

from dataclasses import replace
from pathlib import Path

import pytest
from engines import (
    DEMO_MODEL,
    PROMPTS,
    Outcome,
    drafter,
    engine_process,
    generate,
    running,
    tiny_llama,
)

ALL_LAYERS = {
    "method": "layer_skip",
    "skip_layers": [],
    "num_speculative_tokens": 4,
    "draft_exit_threshold": 0.0,
}
BLOCK = 32
SETTINGS = {"block_size": BLOCK, "max_num_seqs": 8}
LENGTHS = [31, 63, 64, 65, 95, 130, 200]  # before, at and past the borders of blocks
# The sink and the own block; two and three blocks; longer than any context; all.
WINDOWS = [1, 33, 64, 400, None]


def prompts(llm, lengths: list[int] = LENGTHS) -> list[dict]:
    text = llm.get_tokenizer().encode(" ".join(PROMPTS * 2))
    return [{"prompt_token_ids": text[i * 5 : i * 5 + n]} for i, n in enumerate(lengths)]


def by_window(windows: list[int | None], lengths: list[int], tokens: int) -> list[Outcome]:
    """Without drafts, and for each window, on one engine. Drafts cross borders of blocks."""
    with running(**SETTINGS) as llm:
        outcomes = [generate(llm, prompts(llm, lengths), max_tokens=tokens)]
    with running(speculative_config=ALL_LAYERS | {"draft_context": windows[0]}, **SETTINGS) as llm:
        ours = drafter(llm)
        assert ours.options.contexts == (windows[0],)
        for window in windows:
            ours.options, ours._plans = replace(ours.options, contexts=(window,)), None
            outcomes.append(generate(llm, prompts(llm, lengths), max_tokens=tokens))
        assert not ours.statistics.total.failures
    return outcomes


@pytest.fixture(scope="module", params=["v1", "v2"])
def call(request):
    with engine_process(request.param) as call:
        yield call


@pytest.mark.slow_on_v2
def test_output_is_plain_vllms(call, request):
    v2 = "v2" in request.node.name  # a step takes a while there
    plain, *cut = (
        call(by_window, [1, 400, None], [63, 94], 12) if v2 else call(by_window, WINDOWS, LENGTHS, 70)
    )
    rates = [outcome.num_accepted_tokens / outcome.num_draft_tokens for outcome in cut]
    for outcome in cut:
        assert outcome.token_ids == plain.token_ids
    assert rates == sorted(rates)
    assert rates[-2] == rates[-1] > 0.98  # all of it is the target
    assert rates[0] < rates[-1]


def optimising(window: int) -> tuple[list[list[int]], Outcome]:
    spec = {
        "method": "clasp",
        "adaptive": False,
        "num_speculative_tokens": 3,
        "num_skipped_layers": 4,
        "optimization_interval": 1,
        "max_optimized_requests": 8,
        "draft_exit_threshold": 0.0,
        "draft_context": window,
    }
    with running(**SETTINGS) as llm:
        plain = generate(llm, prompts(llm), max_tokens=24).token_ids
    with running(speculative_config=spec, **SETTINGS) as llm:
        return plain, generate(llm, prompts(llm), max_tokens=24)


@pytest.mark.slow_on_v2
def test_the_first_draft_of_an_optimising_round_is_of_the_whole_context(call):
    """Though the columns of the programme see a window."""
    plain, outcome = call(optimising, 1)
    assert outcome.token_ids == plain
    assert outcome.accepted_per_position[0] == outcome.num_drafts > 0
    assert outcome.accepted_per_position[1] < outcome.num_drafts


def first_drafts(window: int) -> list[tuple[list[int], int, int]]:
    """(text, position, the token drafted after it) of the first drafts of rounds."""
    drafts: dict[tuple[str, int], int] = {}
    with running(speculative_config=ALL_LAYERS | {"draft_context": window}, **SETTINGS) as llm:
        ours = drafter(llm)
        original = ours.draft

        def draft(batch, num_tokens, sample):
            drafted = original(batch, num_tokens, sample)
            keys = zip(batch.request_ids, batch.positions.tolist(), strict=True)
            drafts.update(zip(keys, drafted.tokens[:, 0].tolist(), strict=True))
            return drafted

        ours.draft = draft
        given = prompts(llm)
        outcome = generate(llm, given, max_tokens=40)
    texts = [p["prompt_token_ids"] + ids for p, ids in zip(given, outcome.token_ids, strict=True)]
    return [(texts[int(name.split("-")[0])], at, token) for (name, at), token in drafts.items()]


@pytest.mark.parametrize("window", [1, 33])
def test_drafts_are_those_of_dense_attention_with_a_mask(window):
    """By transformers: the drafting token sees the first block and the last ones, those before it all."""
    import torch
    from transformers import AutoModelForCausalLM

    with engine_process("v1") as call:
        drafts = call(first_drafts, window)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32, attn_implementation="eager")
    blocks = 1 + -(-(window - 1) // BLOCK)
    differs = 0
    cut = [draft for draft in drafts if draft[1] // BLOCK > blocks]
    for text, position, token in cut[:: max(len(cut) // 24, 1)]:
        tokens = torch.tensor([text[: position + 1]])
        mask = torch.full((position + 1, position + 1), torch.finfo(torch.float32).min).triu(1)
        mask[-1, BLOCK : (position // BLOCK - blocks + 1) * BLOCK] = torch.finfo(torch.float32).min
        with torch.inference_mode():
            expected = model(tokens, attention_mask=mask[None, None]).logits[0, -1]
            whole = model(tokens).logits[0, -1]
        assert expected[token] > expected.max() - 1e-3
        differs += int(whole.argmax() != expected.argmax())
    assert differs > 0


def adaptive() -> tuple[Outcome, Outcome, list[int], list[int]]:
    """Where reading the context is all that costs something; and what was chosen, before and after windows
    have turned out to lose everything."""
    import clasp_vllm.config.schema as schema

    schema.DRAFT_WINDOWS, lengths = (33, 1), [300, 260, 220]
    spec = {"method": "clasp", "num_speculative_tokens": 4, "max_optimized_requests": 1}
    spec |= {"draft_context": "auto", "ngram_cascade": False}
    with running(**SETTINGS) as llm:
        plain = generate(llm, prompts(llm, lengths), max_tokens=70)
    with running(speculative_config=spec, **SETTINGS) as llm:
        controller = drafter(llm).controller
        costs = controller.costs
        zero = (1e-6,) * len(costs.rows)
        controller.costs = replace(
            costs, layer=zero, fixed=zero, context_rows=(1.0,), context=(1e-3,), context_query=(0.0,)
        )
        controller.corrections.settle = lambda: None
        controller.gate.affords = lambda *_: True
        chosen: list[int] = []
        original = controller.choose

        def choose(*args):
            choice = original(*args)
            if choice.length:
                chosen.append(choice.context)
            return choice

        controller.choose = choose
        for offsets in controller.evidence.windows:  # as if windows lost nothing
            offsets.mean[:] = offsets._guess[:] = 0.0
        outcome = generate(llm, prompts(llm, lengths), max_tokens=70)
        before = len(chosen)
        for offsets in controller.evidence.windows:
            offsets.mean[:] = offsets._guess[:] = -6.0
        again = generate(llm, prompts(llm, lengths), max_tokens=70)
        assert again.token_ids == outcome.token_ids
    return plain, outcome, chosen[:before], chosen[before:]


@pytest.mark.slow_on_v2
def test_the_controller_chooses_a_window_and_leaves_it(call):
    plain, outcome, before, after = call(adaptive)
    assert outcome.token_ids == plain.token_ids
    assert outcome.num_accepted_tokens > 0
    assert sum(context > 0 for context in before) > len(before) / 2
    assert sum(context > 0 for context in after) < len(after) / 2 or not after


def sliding(folder: str) -> list[list[list[int]]]:
    """A model whose layers see the last 40 tokens alone."""
    tiny_llama(Path(folder), kind="mistral", sliding_window=40)
    generated = []
    for spec in (None, ALL_LAYERS | {"draft_context": 33}):
        with running(folder, spec, **SETTINGS) as llm:
            generated.append(generate(llm, prompts(llm), max_tokens=40).token_ids)
    return generated


@pytest.mark.slow_on_v2
def test_a_model_with_a_sliding_window(call, tmp_path):
    plain, cut = call(sliding, str(tmp_path))
    assert cut == plain
