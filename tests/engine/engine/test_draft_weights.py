"""Drafts by quantised weights: the output stays plain vLLM's, and only what is named is quantised."""

import pytest
from engines import PROMPTS, Outcome, drafter, engine_process, generate, model_runner, running, tiny_llama

INT8 = {
    "method": "layer_skip",
    "skip_layers": [],
    "draft_weights": "int8",
    "num_speculative_tokens": 5,
    "draft_exit_threshold": 0.0,
}
INT4 = INT8 | {"draft_weights": "int4", "draft_weights_group_size": 32}
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
        kept = (module for module in model.modules() if KEPT_AS in vars(module))
        modules = [
            module for module in kept if module is not model.model.embed_tokens
        ]  # which may be the head's
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


class UnpackedInt4:
    """Stands for vLLM's kernels for 4 bits, of which that for CPUs needs AVX-512: it unpacks the weight."""

    def __init__(self, config, weight: str, scale: str, zero_point: str) -> None:
        assert config.partition_weight_shape == config.full_weight_shape
        self.config, self.names = config, (weight, scale)

    def process_weights_after_loading(self, layer) -> None:
        assert layer.weight_zero_point is None
        for parameter in (getattr(layer, name) for name in self.names):
            assert (parameter.input_dim, parameter.output_dim) == (1, 0)

    def apply_weights(self, layer, x, bias=None):
        import torch
        from vllm.model_executor.layers.quantization.utils import quant_utils

        packed, scale = (getattr(layer, name) for name in self.names)
        of = self.config.weight_type
        assert (packed.packed_dim, packed.packed_factor) == (1, 8)
        values = quant_utils.unpack_quantized_values_into_int32(packed, of, packed_dim=1) - of.bias
        weight = values * scale.repeat_interleave(self.config.group_size, 1)
        return torch.nn.functional.linear(x, weight.to(x.dtype), bias)


def without_int4_kernel() -> None:
    """Let ``UnpackedInt4`` be the kernel where there is none."""
    import torch

    from clasp_vllm.engine import precisions

    if precisions.unavailable("int4", torch.float32, 64):
        precisions.choose_mp_linear_kernel = lambda config: UnpackedInt4


@pytest.mark.parametrize("config", [INT8 | {"draft_weights": "fp8"}, INT4], ids=["fp8", "int4"])
@pytest.mark.slow_on_v2
def test_other_precisions(call, plain, config):
    """The less exact the weights, the fewer drafts are accepted."""
    call(without_int4_kernel)
    got = call(outcome, config)
    assert got.token_ids == plain.token_ids
    assert 0.2 < got.num_accepted_tokens / got.num_draft_tokens < 0.99


def reloaded(first: str, second: str, speculative_config: object) -> Outcome:
    """What comes after another checkpoint has been loaded in place."""
    with running(first, speculative_config=speculative_config) as llm:
        generate(llm, PROMPTS[:4])
        llm.reset_prefix_cache()
        llm.collective_rpc("reload_weights", kwargs={"weights_path": second})
        return generate(llm, PROMPTS)


def loaded(model: str) -> Outcome:
    with running(model) as llm:
        return generate(llm, PROMPTS)


@pytest.mark.slow_on_v2
def test_reloaded_weights_are_quantised_again(call, tmp_path):
    """Drafts by the old ones would be accepted once in a while at most."""
    models = [str(tiny_llama(tmp_path / str(seed), seed=seed)) for seed in (0, 1)]
    expected = call(loaded, models[1])
    got = call(reloaded, *models, INT8)
    assert got.token_ids == expected.token_ids
    assert got.num_accepted_tokens / got.num_draft_tokens > 0.7


def negated_embedding(model: str) -> float:
    """How far a shared weight's negation carries over to the draft's head: the relative error."""
    import torch

    from clasp_vllm.engine.draft_weights import KEPT_AS, keep_draft_weight

    with running(model, speculative_config=INT8) as llm:
        target = model_runner(llm).model
        embedding, product = target.model.embed_tokens, vars(target.lm_head)[KEPT_AS].product
        x = torch.randn(1, embedding.embedding_dim)
        before = product(x, None)
        embedding.weight.data.neg_()
        keep_draft_weight(embedding, None)  # as vLLM's hook does when it reloads a weight
        return float((product(x, None) + before).norm() / before.norm())


def test_a_head_follows_the_embedding_whose_weight_it_shares(tmp_path):
    """vLLM reloads the embedding alone. (On CPUs its own head then stays the old one.)"""
    with engine_process("v1") as call:
        assert call(negated_embedding, str(tiny_llama(tmp_path, tie_word_embeddings=True))) < 0.01


def chosen(agreement: dict[str, float], draft_seconds: float | None) -> tuple[str, int, Outcome]:
    """What auto takes, the bytes of draft weights, and the output.

    Args:
        agreement: how often drafts at each precision are to agree.
        draft_seconds: what a quantised product is to take, where the target's takes one; None: as it is.
    """
    from clasp_vllm.engine import auto_precision
    from clasp_vllm.engine.draft_weights import num_bytes

    auto_precision.AGREEMENT = agreement
    if draft_seconds is not None:  # on two cores nothing pays for a model as small as this one
        auto_precision._seconds = lambda works, x: 1.0 if "weight" in works[0].keywords else draft_seconds
    config = INT8 | {"draft_weights": "auto", "skip_layers": [12]}
    with running(speculative_config=config) as llm:
        runner = model_runner(llm)
        taken = runner.vllm_config.speculative_config.draft_precision
        return taken, num_bytes(runner.model), generate(llm, PROMPTS)


@pytest.mark.slow_on_v2
def test_auto_takes_the_target_where_nothing_agrees(call, plain):
    """Whatever it costs."""
    taken, size, got = call(chosen, {"int8": 0.0, "fp8": 0.0, "int4": 0.0}, None)
    assert (taken, size) == ("target", 0)
    assert got.token_ids == plain.token_ids
    assert got.num_accepted_tokens > 0


@pytest.mark.slow_on_v2
def test_auto_takes_what_promises_most(call, plain):
    taken, size, got = call(chosen, {"int8": 0.9, "fp8": 0.5, "int4": 0.5}, 0.2)
    assert taken == "int8"
    assert size > 0
    assert got.token_ids == plain.token_ids
    assert 0 < got.num_accepted_tokens < got.num_draft_tokens


def refusal() -> str:
    import os

    from vllm.model_executor.kernels import linear

    names = [kernel.__name__ for kernels in linear._POSSIBLE_KERNELS.values() for kernel in kernels]
    os.environ["VLLM_DISABLED_KERNELS"] = ",".join(names)
    with pytest.raises(ValueError, match="draft_weights") as error, running(speculative_config=INT4):
        pass
    return str(error.value)


def test_a_precision_without_a_kernel_is_refused():
    with engine_process("v1") as call:
        assert "draft_weights='int4' has no kernel here" in call(refusal)


def linear(dtype: str, product: str) -> float:
    """The relative error of a quantised product."""
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor import parameter

    from clasp_vllm.engine import precisions
    from clasp_vllm.engine.draft_weights import DraftLinear

    parameter.get_tensor_model_parallel_rank = lambda: 0  # there is no engine
    parameter.get_tensor_model_parallel_world_size = lambda: 1
    torch.manual_seed(0)
    weight, x = (
        torch.randn(96, 64, dtype=getattr(torch, dtype)),
        torch.randn(3, 64, dtype=getattr(torch, dtype)),
    )
    bias = torch.randn(96, dtype=weight.dtype)
    torch.set_default_dtype(weight.dtype)  # as while vLLM loads a model
    with set_current_vllm_config(VllmConfig()):
        method = DraftLinear(getattr(precisions, product)(group_size=32))
        method.product.load(weight.flip(0))
    method.product.load(weight)  # in the first one's place, while serving
    got, exact = method.apply(torch.nn.Module(), x, bias), torch.nn.functional.linear(x, weight, bias)
    assert got.dtype == x.dtype
    scales = 4  # bytes of an output: one in float32, or two in 16 bits
    assert method.product.num_bytes == 96 * ((32 if product == "Int4" else 64) + scales)
    return float((got - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("product", "error"),
    # Without VNNI, oneDNN rounds inputs more coarsely than to 8 bits.
    [("Int8", 0.1), ("TorchInt8", 0.03), ("Fp8", 0.06), ("Int4", 0.2)],
)
def test_products(dtype, product, error):
    with engine_process("v1") as call:
        call(without_int4_kernel)
        assert 1e-4 < call(linear, dtype, product) < error
