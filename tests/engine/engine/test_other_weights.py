"""Where vLLM loads other weights into an engine, answers and drafts are those of the new model; sleep."""

from __future__ import annotations

from typing import Any

import pytest
from engines import PROMPTS, Outcome, engine_process, generate, model_runner, running, tiny_llama

CLASP = {
    "method": "clasp",
    "adaptive": False,
    "num_speculative_tokens": 4,
    "optimization_interval": 3,
    "draft_exit_threshold": 0.0,
}
CONFIGS = {"the target's": CLASP, "int8": CLASP | {"draft_weights": "int8"}}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    return [str(tiny_llama(tmp_path_factory.mktemp(f"seed{seed}"), seed=seed)) for seed in (0, 1)]


@pytest.fixture(scope="module", params=["v1", pytest.param("v2", marks=pytest.mark.slow)])
def call(request):
    with engine_process(request.param) as call:
        yield call


def load(llm: Any, path: str) -> None:
    llm.collective_rpc("reload_weights", kwargs={"weights_path": path})


def started(model: str, speculative_config: object) -> Outcome:
    with running(model, speculative_config) as llm:
        return generate(llm, PROMPTS, max_tokens=32)


def changed(models: list[str], speculative_config: object) -> Outcome:
    """What comes after another model has served for a while."""
    with running(models[0], speculative_config) as llm:
        generate(llm, PROMPTS, max_tokens=48)
        llm.reset_prefix_cache()
        load(llm, models[1])
        return generate(llm, PROMPTS, max_tokens=32)


@pytest.mark.parametrize("weights", CONFIGS)
def test_nothing_is_left_of_the_old_model(call, models, weights):
    """Not only the answers, every draft is that of an engine started with the new one."""
    config = CONFIGS[weights]
    expected = call(started, models[1], config)
    assert call(changed, models, config) == expected
    assert expected.num_accepted_tokens > 0
    assert expected.token_ids == call(started, models[1], None).token_ids
    assert expected.token_ids != call(started, models[0], None).token_ids


def changed_meanwhile(models: list[str], speculative_config: object) -> tuple[list, list, list, int]:
    """Of requests that ran: prompts, tokens until the change and from then on; then accepted drafts."""
    from vllm import SamplingParams

    def accepted(llm: Any) -> int:
        return sum(m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens")

    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    prompts, tokens = [[] for _ in range(8)], [[] for _ in range(8)]
    with running(models[0], speculative_config, max_num_seqs=8, block_size=32) as llm:
        engine = llm.llm_engine
        for i, prompt in enumerate(PROMPTS[:8]):
            engine.add_request(str(i), prompt, params)

        def step() -> None:
            for output in engine.step():
                i = int(output.request_id)
                prompts[i], tokens[i] = list(output.prompt_token_ids), list(output.outputs[0].token_ids)

        while min(map(len, tokens)) < 12:
            step()
        lengths = [len(ids) for ids in tokens]
        load(llm, models[1])
        assert engine.reset_prefix_cache(reset_running_requests=True)
        before = accepted(llm)
        while engine.has_unfinished_requests():
            step()
        told = [ids[:length] for ids, length in zip(tokens, lengths, strict=True)]
        rest = [ids[length:] for ids, length in zip(tokens, lengths, strict=True)]
        return prompts, told, rest, accepted(llm) - before


def continued(model: str, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
    from vllm import SamplingParams

    params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in lengths]
    with running(model, max_num_seqs=8, block_size=32) as llm:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("weights", CONFIGS)
def test_requests_that_run_go_on_by_the_new_model(call, models, weights):
    prompts, told, rest, accepted = call(changed_meanwhile, models, CONFIGS[weights])
    so_far = [prompt + ids for prompt, ids in zip(prompts, told, strict=True)]
    lengths = [len(ids) for ids in rest]
    assert min(lengths) > 10
    assert rest == call(continued, models[1], so_far, lengths)
    assert rest != call(continued, models[0], so_far, lengths)
    assert accepted > 0


def drop_weights(llm: Any) -> None:
    """As level 2 of sleep does on a GPU; vLLM leaves them on a CPU. Drafts get others for a while."""
    import torch

    from clasp_vllm.engine.draft_weights import KEPT_AS

    model = model_runner(llm).model
    for module in model.modules():
        if KEPT_AS in vars(module) and module is not model.model.embed_tokens:
            linear = hasattr(module, "output_size_per_partition")
            outputs = module.output_size_per_partition if linear else module.num_embeddings_per_partition
            inputs = module.input_size_per_partition if linear else module.embedding_dim
            vars(module)[KEPT_AS].product.load(torch.randn(outputs, inputs))
    for parameter in model.parameters():
        parameter.data.zero_()


def slept(model: str, speculative_config: object) -> tuple[Outcome, Outcome]:
    """What comes before and after the deepest sleep."""
    with running(model, speculative_config) as llm:
        before = generate(llm, PROMPTS, max_tokens=32)
        llm.sleep(level=2, mode="keep")
        drop_weights(llm)
        assert not llm.wake_up(["weights"])
        llm.collective_rpc("reload_weights")
        assert llm.wake_up(["kv_cache"])
        return before, generate(llm, PROMPTS, max_tokens=32)


@pytest.mark.slow
@pytest.mark.parametrize("weights", CONFIGS)
def test_level_2_of_sleep_leaves_answers_and_acceptance(call, models, weights):
    """vLLM issue 52479: every draft was rejected afterwards."""
    before, after = call(slept, models[0], CONFIGS[weights])
    assert after == before
    assert before.num_accepted_tokens > 0
