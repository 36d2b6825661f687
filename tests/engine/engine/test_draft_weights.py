"""Drafts by quantised weights: the output stays plain vLLM's, and only what is named is quantised."""

import pytest
from engines import PROMPTS, Outcome, drafter, engine_process, generate, model_runner, running

INT8 = {
    "method": "layer_skip",
    "skip_layers": [],
    "draft_weights": "int8",
    "num_speculative_tokens": 5,
    "draft_exit_threshold": 0.0,
}
CLASP = {
    "method": "clasp",
    "adaptive": False,
    "draft_weights": "int8",
    "num_skipped_layers": 12,
    "num_speculative_tokens": 5,
    "draft_exit_threshold": 0.0,
}


def outcome(speculative_config: object, **settings) -> Outcome:
    with running(speculative_config=speculative_config, **settings) as llm:
        return generate(llm, PROMPTS)


@pytest.fixture(scope="module", params=["v1", "v2"])
def call(request):
    with engine_process(request.param) as call:
        yield call


@pytest.fixture(scope="module")
def plain(call) -> Outcome:
    return call(outcome, None)


def test_greedy_output_is_identical(call, plain):
    """And nearly all is accepted: by rounding alone, quantised weights differ from the target's."""
    got = call(outcome, INT8)
    assert got.token_ids == plain.token_ids
    assert 0.8 < got.num_accepted_tokens / got.num_draft_tokens < 1


def test_first_draft_of_an_optimising_round_is_always_accepted(call, plain):
    """It is the target's own; those after it skip half of the quantised layers."""
    got = call(outcome, CLASP | {"optimization_interval": 1, "max_optimized_requests": 16})
    assert got.token_ids == plain.token_ids
    assert got.accepted_per_position[0] == got.num_drafts > 0
    assert 0 < got.accepted_per_position[1] < got.num_drafts


def adaptive(speculative_config: object) -> tuple[Outcome, tuple[int, ...]]:
    """The output, and the budgets to choose from."""
    with running(speculative_config=speculative_config) as llm:
        return generate(llm, PROMPTS), tuple(drafter(llm).options.budgets)


@pytest.mark.slow_on_v2
def test_the_controller_may_skip_nothing(call, plain):
    got, budgets = call(adaptive, {"method": "clasp", "draft_weights": "int8", "ngram_cascade": False})
    assert got.token_ids == plain.token_ids
    assert budgets == tuple(range(17))


def quantised(speculative_config: object) -> tuple[int, int, int]:
    """Bytes of quantised weights as named, by their shapes, and how many modules have some."""
    from clasp_vllm.engine.draft_weights import KEPT_AS, num_bytes

    with running(speculative_config=speculative_config) as llm:
        model = model_runner(llm).model
        modules = [module for module in model.modules() if KEPT_AS in vars(module)]
        outputs = [(m.output_size_per_partition, m.input_size_per_partition) for m in modules[:-1]]
        if modules:
            outputs.append((modules[-1].num_embeddings_per_partition, modules[-1].embedding_dim))
        by_shape = sum(n * k + 4 * n for n, k in outputs)
        return num_bytes(model), by_shape, len(modules)


def test_memory_is_named_and_none_is_taken_without(call):
    named, by_shape, modules = call(quantised, INT8)
    assert named == by_shape > 0
    assert modules == 24 * 4 + 1  # and the head
    assert call(quantised, INT8 | {"draft_weights": "target"}) == (0, 0, 0)
    assert call(quantised, None) == (0, 0, 0)


def linear(dtype: str, kernel: str) -> float:
    """The relative error of a quantised product."""
    import torch

    from clasp_vllm.engine import draft_weights

    torch.manual_seed(0)
    weight, x = (
        torch.randn(96, 64, dtype=getattr(torch, dtype)),
        torch.randn(3, 64, dtype=getattr(torch, dtype)),
    )
    bias = torch.randn(96, dtype=weight.dtype)
    torch.set_default_dtype(weight.dtype)  # as while vLLM loads a model
    method = draft_weights.DraftLinear(getattr(draft_weights, kernel))
    method.load(weight)
    got, exact = method.apply(torch.nn.Module(), x, bias), torch.nn.functional.linear(x, weight, bias)
    assert got.dtype == x.dtype
    assert method.num_bytes == 96 * 64 + 96 * 4
    return float((got - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", ["VllmInt8", "TorchInt8"])
def test_products(dtype, kernel):
    with engine_process("v1") as call:
        # Without VNNI, oneDNN rounds inputs more coarsely than to 8 bits.
        assert 1e-4 < call(linear, dtype, kernel) < (0.1 if kernel == "VllmInt8" else 0.03)
