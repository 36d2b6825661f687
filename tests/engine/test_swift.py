"""SWIFT in the engine: lossless while it searches, and what it tries is what the draft would do."""

import pytest
from engines import PROMPTS, drafter, engine_process, generate, running

SWIFT = {"method": "swift", "num_speculative_tokens": 4}


def served(config: object, tokens: int) -> tuple:
    """What was generated, the sets tried with their scores, and whether the best is what all skip."""
    with running(speculative_config=config, max_num_seqs=8) as llm:
        outcome = generate(llm, PROMPTS[:8], max_tokens=tokens)
        if config is None:
            return outcome, {}, True, 0.0
        policy, masks = drafter(llm).policy, drafter(llm).sequences.masks[:, 0]
        used = [frozenset(mask.flatten().nonzero().flatten().tolist()) for mask in masks]
        metrics = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
        best = all(skipped == policy.search.best for skipped in used)
        return outcome, policy.search.scores, best, metrics["vllm:layer_skip_tried"]


@pytest.fixture(scope="module")
def call():
    with engine_process("v1") as run:
        yield run


@pytest.mark.parametrize("adaptive", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_lossless_while_it_searches(adaptive, call):
    plain, *_ = call(served, None, 96)
    more = {"adaptive": ["length", "exit"], "ngram_cascade": False} if adaptive else {}
    found, scores, best_is_used, tried = call(served, SWIFT | more, 96)
    assert found.token_ids == plain.token_ids
    assert found.num_accepted_tokens > 0
    assert tried >= len(scores) > 3
    assert best_is_used
    assert len(set(scores.values())) > 1


def replayed(prompts: list[str], tokens: int) -> list[tuple[float, float]]:
    """For each round that tried: the share said again with nothing skipped, and with all but two layers."""
    import torch

    found = []
    with running(speculative_config=SWIFT, max_num_seqs=8, block_size=32) as llm:
        policy, passes = drafter(llm).policy, drafter(llm).passes
        original = passes.replay

        def replay(batch, told, mask):
            nothing = torch.zeros_like(mask)
            most = ~nothing
            most[[0, -1]] = False
            shares = [original(batch, told, some).float().mean().item() for some in (nothing, most)]
            found.append(tuple(shares))
            return original(batch, told, mask)

        passes.replay = replay
        search = policy.search

        def tell(candidate, score):  # go on for ever, with one request after the other
            search.steps += 1
            return False

        search.tell = tell
        generate(llm, prompts, max_tokens=tokens)
    return found


def test_with_nothing_skipped_every_token_is_said_again(call):
    found = call(replayed, PROMPTS[:3], 80)
    assert len(found) > 10
    assert all(whole == 1.0 for whole, _ in found)
    assert all(little < 0.9 for _, little in found)


def test_where_it_cannot_search_it_is_refused():
    from clasp_vllm.config import ConfigError

    for runner, config, words in (
        ("v2", SWIFT, "Model Runner V1"),
        ("v1", SWIFT | {"skip_ratio": 0.01}, "skip_ratio=0.01 skips 0 of the 44 sub-layers"),
    ):
        with engine_process(runner) as run, pytest.raises((ConfigError, ValueError), match=words):
            run(served, config, 4)
