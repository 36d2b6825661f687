"""What a round does on the real engine: which layers run, and what its first drafts are worth."""

import pytest
from engines import PROMPTS, drafter, engine_process, generate, running

MIXED = {
    "method": "clasp",
    "adaptive": False,
    "num_speculative_tokens": 4,
    "optimization_interval": 3,
    "max_optimized_requests": 3,
    "draft_exit_threshold": 0.0,
}


def first_drafts() -> tuple[list[tuple[bool, bool]], int]:
    """(optimised, accepted) of every first draft, and the rounds in which only some were optimised."""
    with running(speculative_config=MIXED) as llm:
        ours = drafter(llm)
        optimised: set[tuple[str, int]] = set()
        drafts: dict[tuple[str, int], int] = {}
        mixed_rounds = 0
        original_programme, original_draft = ours.policy.run_programme, ours.draft

        def run_programme(batch, prior, window):
            optimised.update(zip(batch.request_ids, batch.positions.tolist(), strict=True))
            return original_programme(batch, prior, window)

        def draft(batch, num_tokens, sample):
            nonlocal mixed_rounds
            before = len(optimised)
            drafted = original_draft(batch, num_tokens, sample)
            mixed_rounds += 0 < len(optimised) - before < len(batch)
            keys = zip(batch.request_ids, batch.positions.tolist(), strict=True)
            drafts.update(zip(keys, drafted.tokens[:, 0].tolist(), strict=True))
            return drafted

        ours.policy.run_programme, ours.draft = run_programme, draft
        tokenizer = llm.get_tokenizer()
        outcome = generate(llm, PROMPTS[:8], max_tokens=40)
        texts = [tokenizer.encode(p) + ids for p, ids in zip(PROMPTS, outcome.token_ids, strict=False)]
    flags = []
    for (request, position), token in drafts.items():
        text = texts[int(request.split("-")[0])]
        if position + 1 < len(text):
            flags.append(((request, position) in optimised, text[position + 1] == token))
    return flags, mixed_rounds


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_column_zero_is_certain_in_mixed_rounds(runner):
    with engine_process(runner) as call:
        flags, mixed_rounds = call(first_drafts)
    assert mixed_rounds > 5
    exact = [accepted for was_optimised, accepted in flags if was_optimised]
    drafted = [accepted for was_optimised, accepted in flags if not was_optimised]
    assert len(exact) > 20
    assert all(exact)
    assert not all(drafted)  # so the other rows' drafts are of another kind


def layers_run(skip_layers: list[int]) -> dict[int, int]:
    """How often drafting ran each layer's parts, per draft step."""
    settings = {"method": "layer_skip", "skip_layers": skip_layers, "num_speculative_tokens": 3}
    with running(speculative_config=settings) as llm:
        ours = drafter(llm)
        runs = dict.fromkeys(range(24), 0)
        original = ours.decoder.run_sublayer

        def run_sublayer(layer, part, positions, state):
            runs[layer] += 1
            return original(layer, part, positions, state)

        ours.decoder.run_sublayer = run_sublayer
        generate(llm, PROMPTS[:4], max_tokens=16)
        steps = ours.statistics.total.steps
    return {layer: count // steps for layer, count in runs.items() if count % steps == 0}


def test_a_layer_skipped_by_all_is_not_run():
    with engine_process("v1") as call:
        runs = call(layers_run, [3, 7, 23])
    assert runs == {layer: 0 if layer in (3, 7, 23) else 2 for layer in range(24)}


def stopped_early(drop: bool) -> tuple[list, int]:
    """Every round's drafts up to their lengths, and the rows that draft steps had in all."""
    settings = {"method": "layer_skip", "skip_ratio": 0.5, "draft_exit_threshold": 0.5}
    with running(speculative_config=settings) as llm:
        ours = drafter(llm)
        assert ours.drop_stopped  # as on any CPU
        ours.drop_stopped = drop
        drafts, rows = [], 0
        original_draft, original_step = ours.draft, ours.passes.draft_step

        def draft(batch, num_tokens, sample):
            drafted = original_draft(batch, num_tokens, sample)
            for request, row, length in zip(
                batch.request_ids, drafted.tokens.tolist(), drafted.lengths.tolist(), strict=True
            ):
                drafts.append((request.split("-")[0], row[:length]))
            return drafted

        def step(batch, plan):
            nonlocal rows
            rows += len(batch)
            return original_step(batch, plan)

        ours.draft, ours.passes.draft_step = draft, step
        generate(llm, PROMPTS[:6], max_tokens=24)
    return drafts, rows


def test_sequences_that_have_stopped_are_left_out_of_further_steps():
    with engine_process("v1") as call:
        drafts, rows = call(stopped_early, True)
        same_drafts, more_rows = call(stopped_early, False)
    assert drafts == same_drafts
    assert len({len(tokens) for _, tokens in drafts}) > 3
    assert rows == sum(len(tokens) for _, tokens in drafts)
    assert more_rows > rows * 1.2
