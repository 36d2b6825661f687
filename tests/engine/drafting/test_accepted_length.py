"""How many drafts are accepted: the engine against a slow loop that shares no code with it."""

import pytest
from engines import DEMO_MODEL, PROMPTS, engine_process, generate, running
from opponent import Opponent, Settings

SETTINGS = Settings(num_skipped=12, num_tokens=6, threshold=0.4, interval=3)
TOKENS = 32


def served(prompts: list[str]) -> list[tuple[list[int], list[int], int, int]]:
    """Of each prompt, one by one: its tokens, those generated, and the counts of drafts and accepted."""
    config = {
        "method": "clasp",
        "adaptive": False,
        "num_skipped_layers": SETTINGS.num_skipped,
        "num_speculative_tokens": SETTINGS.num_tokens,
        "draft_exit_threshold": SETTINGS.threshold,
        "optimization_interval": SETTINGS.interval,
        "mask_memory": 0.0,
    }
    per_prompt = []
    with running(DEMO_MODEL, config) as llm:
        tokenizer = llm.get_tokenizer()
        for prompt in prompts:
            outcome = generate(llm, [prompt], max_tokens=TOKENS)
            counts = outcome.num_drafts, outcome.num_accepted_tokens
            per_prompt.append((tokenizer.encode(prompt), outcome.token_ids[0], *counts))
    return per_prompt


def test_accepted_length_is_the_slow_loops():
    prompts = PROMPTS[::2]
    with engine_process("v1") as call:
        engine = call(served, prompts)
    opponent, same = Opponent(DEMO_MODEL), 0
    mean = {"engine": [0, 0], "slow loop": [0, 0]}
    for prompt, tokens, drafts, accepted in engine:
        expected, rounds = opponent.accepted(prompt, TOKENS, SETTINGS)
        assert tokens == expected[:TOKENS]
        mean["engine"][0] += accepted
        mean["engine"][1] += drafts
        mean["slow loop"][0] += sum(rounds)
        mean["slow loop"][1] += len(rounds)
        same += abs(drafts - len(rounds)) <= 1
    length = {name: 1 + accepted / rounds for name, (accepted, rounds) in mean.items()}
    print("mean accepted length:", length, f"rounds alike in {same} of {len(engine)} prompts")
    # Near-ties of two layers may fall differently, and the engine's last round may be cut short.
    assert length["engine"] == pytest.approx(length["slow loop"], rel=0.04)
    assert same >= len(engine) - 1


@pytest.mark.slow
def test_where_the_programme_looks():
    """The paper optimises on the last verified token; what the token to draft from gives instead."""
    with engine_process("v1") as call:
        prompts = [prompt for prompt, *_ in call(served, PROMPTS)]
    opponent = Opponent(DEMO_MODEL)
    for interval in (1, 3, 8):
        for late in (False, True):
            settings = Settings(12, 6, 0.4, interval, on_last_verified=late)
            rounds = [n for prompt in prompts for n in opponent.accepted(prompt, 48, settings)[1]]
            where = "last verified token" if late else "token to draft from"
            print(f"every {interval} rounds, {where}: {1 + sum(rounds) / len(rounds):.2f} tokens a round")
            assert rounds
