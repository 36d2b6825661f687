"""LoRA: verification runs each request's adapter, drafts the base layers."""

import json
from pathlib import Path

import pytest
import torch
from engines import DEMO_MODEL, PROMPTS, Outcome, drafter, engine_process, generate, running
from safetensors.torch import save_file

CLASP = {"method": "clasp", "adaptive": False, "num_speculative_tokens": 4, "optimization_interval": 2}
RANK = 8
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapter(folder: Path, seed: int) -> str:
    """A random adapter of all linear layers, large enough to change answers; returns its folder."""
    torch.manual_seed(seed)
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    hidden, width, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    attention = (hidden, heads), (hidden, kv_heads), (hidden, kv_heads), (heads, hidden)
    mlp = (hidden, width), (hidden, width), (width, hidden)
    sizes = dict(zip(LINEARS, (*attention, *mlp), strict=True))
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (before, after) in sizes.items():
            module = "mlp" if name in LINEARS[4:] else "self_attn"
            prefix = f"base_model.model.model.layers.{layer}.{module}.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(RANK, before) / before**0.5
            weights[f"{prefix}.lora_B.weight"] = torch.randn(after, RANK) * 0.02
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(LINEARS)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return str(folder)


def answers(speculative_config: object, adapters: list[str], length: int) -> tuple[Outcome, Outcome, int]:
    """Of four prompts with no adapter, the first and the second, all at once; then with the first alone."""
    from vllm.lora.request import LoRARequest

    loras = [None, *(LoRARequest(f"adapter {i}", i, path) for i, path in enumerate(adapters, 1))]
    # On a CPU vLLM gives requests without an adapter that of the last slot (its pull request 48421): leave it
    # empty.
    lora = {"enable_lora": True, "max_loras": 3, "max_lora_rank": RANK}
    prompts = PROMPTS[::4]
    with running(speculative_config=speculative_config, **lora) as llm:
        each = [asked for asked in loras for _ in prompts]
        mixed = generate(llm, prompts * 3, lora_request=each, max_tokens=length)
        alone = generate(llm, prompts, lora_request=[loras[1]] * 4, max_tokens=length)
        failures = drafter(llm).statistics.total.failures if speculative_config else 0
    return mixed, alone, failures


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("adapters")
    return [adapter(folder / name, seed) for seed, name in enumerate(("first", "second"))]


@pytest.fixture(scope="module", params=["v1", pytest.param("v2", marks=(pytest.mark.slow, pytest.mark.v2))])
def plain(request, adapters) -> tuple[str, int, list[list[int]]]:
    length = 32 if request.param == "v1" else 8  # which is interpreted
    with engine_process(request.param) as call:
        mixed, alone, _ = call(answers, None, adapters, length)
    return request.param, length, mixed.token_ids + alone.token_ids


@pytest.mark.parametrize("draft_weights", ["target", pytest.param("int8", marks=pytest.mark.slow)])
def test_answers_are_plain_vllms(plain, adapters, draft_weights):
    runner, length, expected = plain
    with engine_process(runner) as call:
        mixed, alone, failures = call(answers, CLASP | {"draft_weights": draft_weights}, adapters, length)
    assert mixed.token_ids + alone.token_ids == expected
    assert mixed.num_accepted_tokens > 0
    assert alone.num_accepted_tokens > 0
    assert failures == 0


def test_adapters_change_the_answers(plain):
    base, first, second = (plain[2][i : i + 4] for i in (0, 4, 8))
    assert base != first
    assert base != second
    assert first != second
