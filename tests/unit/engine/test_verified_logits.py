"""min_p and logit_bias for draft tokens: each row of a request gets what vLLM's processors do to one."""

from types import SimpleNamespace

import pytest
import torch

COUNTS = [2, 0, 3, 1]
TEMPERATURES = [1.0, 0.5, 0.0, 2.0]
MIN_P = [0.3, 0.1, 0.0, 0.6]
BIASES = [{3: 2.0, 5: -100.0}, {1: 50.0}, None, {0: 1.0}]


def metadata() -> SimpleNamespace:
    """Of four requests, with vLLM's processors in this state."""
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate

    from clasp_vllm.engine.verified_logits import builtin_processors

    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=8))
    processors = builtin_processors(config, torch.device("cpu"), False)
    requests = [
        SamplingParams(temperature=temperature, min_p=min_p, logit_bias=bias)
        for temperature, min_p, bias in zip(TEMPERATURES, MIN_P, BIASES, strict=True)
    ]
    added = [(row, params, [], []) for row, params in enumerate(requests)]
    for processor in processors.all:
        processor.update_state(BatchUpdate(batch_size=4, removed=[], added=added, moved=[]))
    return SimpleNamespace(logitsprocs=processors, temperature=torch.tensor(TEMPERATURES))


def test_rows_of_drafts_are_treated_as_those_of_the_sampler():
    from clasp_vllm.engine.verified_logits import add_logit_bias, apply_min_p

    of_batch = metadata()
    logits = 2 * torch.randn(sum(COUNTS), 8, generator=torch.Generator().manual_seed(0))
    ours, row = logits.clone(), 0
    add_logit_bias(ours, of_batch, COUNTS)
    biased = ours.clone()
    apply_min_p(ours, of_batch, COUNTS)
    for request, count in enumerate(COUNTS):
        for _ in range(count):
            alone = logits[row].repeat(len(COUNTS), 1)  # vLLM's have one row for each request
            for processor in of_batch.logitsprocs.non_argmax_invariant:
                alone = processor.apply(alone)
            assert torch.equal(biased[row], alone[request])
            alone /= of_batch.temperature.masked_fill(of_batch.temperature == 0, 1.0).unsqueeze(1)
            for processor in of_batch.logitsprocs.argmax_invariant:
                alone = processor.apply(alone)
            assert torch.equal(ours[row].isneginf(), alone[request].isneginf())
            row += 1
    kept = ~ours.isneginf()
    assert torch.equal(ours[kept], biased[kept])
    assert not kept.all()


def test_greedy_batches_are_left_alone():
    from clasp_vllm.engine.verified_logits import apply_min_p

    of_batch = metadata()
    of_batch.temperature = None
    logits = torch.randn(sum(COUNTS), 8)
    before = logits.clone()
    apply_min_p(logits, of_batch, COUNTS)
    assert torch.equal(logits, before)


def test_other_packages_processors_are_refused(monkeypatch):
    import clasp_vllm.engine.verified_logits as module
    from clasp_vllm.config import ConfigError

    monkeypatch.setattr(module, "entry_points", lambda group: [SimpleNamespace(name="theirs")])
    with pytest.raises(ConfigError, match=r"\(theirs\) with Model Runner V1"):
        module.builtin_processors(None, torch.device("cpu"), False)
