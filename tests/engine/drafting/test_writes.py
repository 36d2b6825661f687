"""Drafting writes into lookahead slots and scratch blocks and nowhere else; dummy runs write nothing."""

import pytest
from engines import PROMPTS, drafter, engine_process, generate, model_runner, running

CLASP = {
    "method": "clasp",
    "adaptive": False,
    "num_speculative_tokens": 4,
    "optimization_interval": 2,
    "max_optimized_requests": 3,
    "draft_exit_threshold": 0.0,
}
BLOCK = 32
MAX_MODEL_LEN = 96


def caches(llm) -> dict:
    """Every layer's KV cache; its first dimension counts kernel blocks."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    names = [n for g in model_runner(llm).kv_cache_config.kv_cache_groups for n in g.layer_names]
    return {name: layers[name].kv_cache for name in names}


def watch_drafts(llm) -> list[tuple[set, set, set, set]]:
    """For each round: blocks changed, blocks that may change, slots written, slots that may be."""
    import clasp_vllm.engine.attention as attention

    ours, rounds, slots = drafter(llm), [], set()
    build, original = attention.build_attn_metadata, ours.draft
    scratch = set(ours.passes.scratch._ids.flatten().tolist())

    def build_attn_metadata(**arguments):
        slots.update(arguments["slot_mappings"].flatten().tolist())
        return build(**arguments)

    def draft(batch, num_tokens, sample):
        before = {name: cache.clone() for name, cache in caches(llm).items()}
        slots.clear()
        result = original(batch, num_tokens, sample)
        changed = set()
        for name, cache in caches(llm).items():
            parts = len(cache) // model_runner(llm).kv_cache_config.num_blocks
            different = (cache != before[name]).flatten(1).any(1).nonzero().flatten()
            changed |= {index // parts for index in different.tolist()}
        lookahead = {
            int(batch.block_table[row, position // BLOCK]) * BLOCK + position % BLOCK
            for row, first in enumerate(batch.positions.tolist())
            for position in range(first, min(first + num_tokens, MAX_MODEL_LEN))
        }
        allowed = lookahead | {block * BLOCK + i for block in scratch for i in range(BLOCK)} | {-1}
        rounds.append((changed, {slot // BLOCK for slot in allowed}, set(slots), allowed))
        return result

    ours.draft, attention.build_attn_metadata = draft, build_attn_metadata
    return rounds


def written() -> tuple[list, list[list[int]]]:
    """Rounds of requests that share prefixes, arrive in chunks and run into the end of the context."""
    settings = {"block_size": BLOCK, "max_model_len": MAX_MODEL_LEN, "max_num_batched_tokens": 48}
    with running(speculative_config=CLASP, **settings, max_num_seqs=5) as llm:
        rounds = watch_drafts(llm)
        prompts = [PROMPTS[1], PROMPTS[1] + " 8", PROMPTS[2], PROMPTS[6], PROMPTS[13], "a"]
        outcome = generate(llm, prompts, max_tokens=100)
        return rounds, outcome.token_ids


def after_dummy_runs() -> tuple[int, int]:
    """How many values of the caches dummy runs change, outside of the null block, after real requests."""
    import torch

    with running(speculative_config=CLASP, block_size=BLOCK) as llm:
        generate(llm, PROMPTS[:6], max_tokens=20)  # leaves stale block tables
        ours = drafter(llm)
        drafts_before = ours.statistics.total.rounds
        for cache in caches(llm).values():
            cache.fill_(7)
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        for _ in range(3):
            worker.execute_dummy_batch()
        changed = 0
        for cache in caches(llm).values():
            parts = len(cache) // model_runner(llm).kv_cache_config.num_blocks
            changed += int(torch.count_nonzero(cache[parts:] != 7))
        return changed, ours.statistics.total.rounds - drafts_before


@pytest.fixture(scope="module", params=["v1", pytest.param("v2", marks=pytest.mark.slow)])
def call(request):
    with engine_process(request.param) as call:
        yield call


def test_only_lookahead_slots_and_scratch_are_written(call):
    rounds, token_ids = call(written)
    assert len(rounds) > 10
    assert any(len(ids) < 90 for ids in token_ids)  # the end of the context
    assert any(-1 in slots for _, _, slots, _ in rounds)
    for changed, blocks, slots, allowed in rounds:
        assert slots <= allowed
        assert changed
        assert changed <= blocks


def test_dummy_runs_write_nothing(call):
    changed, rounds = call(after_dummy_runs)
    assert changed == 0
    assert rounds == 0
