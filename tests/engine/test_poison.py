"""Verification reads nothing that drafting wrote: with NaN in its place the output is plain vLLM's.

On any device and with either runner: the backend's own operation writes what stands for keys and values.
"""

import pytest
from engines import PROMPTS, Outcome, drafter, engine_process, generate, model_runner, running

CLASP = {
    "method": "clasp",
    "adaptive": False,
    "num_speculative_tokens": 4,
    "optimization_interval": 2,
    "max_optimized_requests": 3,
    "draft_exit_threshold": 0.0,
}
SETTINGS = {"block_size": 32, "max_model_len": 128, "max_num_seqs": 6}

TOKENS = 40  # of an answer


def poison_after_drafting(llm, value: float, first: int) -> list[int]:
    """After each round fill what the drafts may have written: lookahead slots and scratch blocks.

    Args:
        value: of all keys and values there.
        first: where to begin, from the position of the last sampled token, whose keys and values drafting
            computes and verification again. -1 = the token before, which verification reads.

    Returns:
        A list that grows by the number of lookahead slots of each round.
    """
    import torch

    ours, poisoned = drafter(llm), []
    attention, original = ours.passes.attention, ours.draft
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    names = [n for g in model_runner(llm).kv_cache_config.kv_cache_groups for n in g.layer_names]
    size, scratch = attention.block_size, ours.passes.scratch._ids.flatten().tolist()
    in_scratch = [block * size + i for block in scratch for i in range(size)]

    starts: dict[str, int] = {}
    cuts = hasattr(getattr(model_runner(llm), "drafter", None), "_room")  # V1

    def draft(batch, num_tokens, sample):
        made = original(batch, num_tokens, sample)
        slots = []
        rows = zip(batch.request_ids, batch.block_table.tolist(), batch.positions.tolist(), strict=True)
        for name, table, position in rows:
            # V1 verifies no draft past an answer's end, and NaN that nothing overwrites, though its weight is
            # zero, is NaN.
            room = TOKENS - 2 - (position - starts.setdefault(name, position)) if cuts else num_tokens
            end = position + min(num_tokens, room) + 1
            for at in range(position + first, min(end, attention.max_model_len)):
                if table[at // size]:  # no block has been given to it: it will not be scheduled
                    slots.append(table[at // size] * size + at % size)
        poisoned.append(len(slots))
        where = torch.tensor(slots + in_scratch, device=batch.tokens.device)
        for name in names:
            layer = layers[name]
            shape = len(where), layer.num_kv_heads, layer.head_size
            poison = torch.full(shape, value, dtype=torch.float32, device=where.device)
            layer.impl.do_kv_cache_update(layer, poison, poison, layer.kv_cache, where)
        return made

    ours.draft = draft
    return poisoned


def poisoned(value: float, first: int) -> tuple[Outcome, list[int], int]:
    with running(speculative_config=CLASP, **SETTINGS) as llm:
        rounds = poison_after_drafting(llm, value, first)
        outcome = generate(llm, PROMPTS[1:7], max_tokens=TOKENS)
        return outcome, rounds, drafter(llm).statistics.total.failures


def plain() -> Outcome:
    with running(**SETTINGS) as llm:
        return generate(llm, PROMPTS[1:7], max_tokens=TOKENS)


@pytest.mark.slow_on_v2
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_verification_reads_nothing_that_drafting_wrote(runner):
    with engine_process(runner) as call:
        expected = call(plain)
        outcome, rounds, failures = call(poisoned, float("nan"), 0)
        read, _, _ = call(poisoned, 3.0, -1)  # a number, for vLLM's interpreted sampler refuses NaN
    assert outcome.token_ids == expected.token_ids
    assert outcome.num_accepted_tokens > 0
    assert sum(rounds) > 100
    assert failures == 0
    assert read.token_ids != expected.token_ids  # the test can fail
