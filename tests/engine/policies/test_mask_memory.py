"""What a pass leaves behind: the prior of the next, and the mask that new requests start with."""

from dataclasses import replace

import pytest
from engines import PROMPTS, drafter, engine_process, generate, running

CLASP = {
    "method": "clasp",
    "adaptive": False,
    "num_speculative_tokens": 4,
    "optimization_interval": 3,
    "max_optimized_requests": 2,
    "draft_exit_threshold": 0.0,
}


def passes(
    config: dict, broken: int = -1, late: bool = False
) -> tuple[list[dict], list[list[int]], list[bool]]:
    """Every pass (requests, margins, prior), what was generated, and the initial mask at the end.

    The margins of pass number ``broken`` are made NaN; ``late``: masks come a round late, as on a GPU.
    """
    recorded_passes: list[dict] = []
    with running(speculative_config=config) as llm:
        ours = drafter(llm)
        ours.policy._handover.always_late = late
        original = ours.policy.run_programme

        def run_programme(batch, prior, window):
            programme, hidden = original(batch, prior, window)
            if len(recorded_passes) == broken:
                programme = replace(programme, margins=programme.margins * float("nan"))
            recorded_passes.append(
                {"requests": list(batch.request_ids), "margins": programme.margins, "prior": prior}
            )
            return programme, hidden

        ours.policy.run_programme = run_programme
        tokens = [generate(llm, [prompt], max_tokens=24).token_ids[0] for prompt in PROMPTS[:3]]
        tokens += generate(llm, PROMPTS[3:7], max_tokens=24).token_ids
        initial = ours.sequences.initial_mask[0, :, 0].tolist()
    return recorded_passes, tokens, initial


@pytest.fixture(scope="module")
def call():
    with engine_process("v1") as call:
        yield call


@pytest.fixture(scope="module")
def remembered(call):
    return call(passes, CLASP | {"mask_memory": 0.8})


def test_the_prior_is_what_the_passes_before_have_left(remembered):
    import torch

    recorded_passes, _, _ = remembered
    assert recorded_passes[0]["prior"] is None
    last: dict[str, torch.Tensor] = {}
    overall, known = recorded_passes[0]["margins"].mean(2), 0
    for number, one in enumerate(recorded_passes):
        for row, request in enumerate(one["requests"]):
            if number:
                expected = last.get(request, overall)
                torch.testing.assert_close(one["prior"][..., row], expected, atol=1e-4, rtol=1e-4)
                known += request in last
            last[request] = one["margins"][..., row]
        if number:
            alone = (one["margins"] - 0.8 * one["prior"]) / 0.2
            overall = overall.lerp(alone.mean(2), max(1 / (number + 1), 0.05))
    assert 3 < known < len(recorded_passes)  # passes of both kinds


def test_new_requests_start_from_what_all_have_found(call, remembered):
    _, tokens, initial = remembered
    recorded_passes, same_tokens, evenly = call(passes, CLASP | {"mask_memory": 0.0})
    assert all(one["prior"] is None for one in recorded_passes)
    assert tokens == same_tokens  # lossless, whatever the masks
    assert sum(initial) == sum(evenly) == 12
    assert initial != evenly


def test_masks_a_round_late(call, remembered):
    recorded_passes, tokens, initial = call(passes, CLASP, late=True)
    assert tokens == remembered[1]
    assert len(recorded_passes) > 4
    assert sum(a != b for a, b in zip(initial, remembered[2], strict=True)) <= 6


def test_a_broken_pass_is_forgotten(call, remembered):
    """Not-a-numbers must not stay in the averages; they would make every later choice a bad one."""
    recorded_passes, tokens, initial = call(passes, CLASP, 1)
    assert tokens == remembered[1]
    assert not any(one["prior"].isnan().any() for one in recorded_passes[1:])
    assert len(recorded_passes) > 4
    assert sum(initial) == 12
    assert sum(a != b for a, b in zip(initial, remembered[2], strict=True)) <= 6
