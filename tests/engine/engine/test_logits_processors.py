"""Custom logits processors, which Model Runner V2 has: what they do to a token they do to drafts of it."""

import pytest
from engines import PROMPTS, engine_process, generate, running

CLASP = {"method": "clasp", "adaptive": False, "num_speculative_tokens": 4, "draft_exit_threshold": 0.0}


def processed(speculative_config: object, processor: bool) -> tuple[list[list[int]], int]:
    """Answers where a token is not taken whose number adds up with the last one's to a third of all; and
    accepted drafts."""
    import torch
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

    class NoThirds(LogitsProcessor):
        def apply(self, logits, ctx):
            sums = torch.arange(logits.shape[1], device=logits.device) + ctx.input_ids.unsqueeze(1)
            return logits.masked_fill_(sums % 3 == 0, float("-inf"))

    given = {"logits_processors": [NoThirds]} if processor else {}
    with running(speculative_config=speculative_config, **given) as llm:
        outcome = generate(llm, PROMPTS[:4], max_tokens=16)
        return outcome.token_ids, outcome.num_accepted_tokens


@pytest.mark.slow
@pytest.mark.v2
def test_output_is_plain_vllms():
    with engine_process("v2") as call:
        expected, _ = call(processed, None, True)
        assert expected != call(processed, None, False)[0]
        got, accepted = call(processed, CLASP, True)
    assert got == expected
    assert accepted > 0
