"""A widened model computes what the small one does."""

import json

import pytest
import torch
from engines import DEMO_MODEL

from clasp_vllm.bench.widen import WidenError, widen


def logits(path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.arange(3, 67).view(2, 32)).logits


def save(kind: str, folder) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.1,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("factor", [2, 3])
def test_same_function(kind, factor, tmp_path):
    save(kind, tmp_path / "small")
    widen(tmp_path / "small", tmp_path / "wide", factor)
    small, wide = logits(tmp_path / "small"), logits(tmp_path / "wide")
    assert (small - wide).abs().max() < 1e-4 * small.abs().max()


def test_the_demo_model_grows_by_the_square(tmp_path):
    widen(DEMO_MODEL, tmp_path, 4)
    assert torch.allclose(logits(DEMO_MODEL), logits(tmp_path), rtol=1e-3, atol=1e-3)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["hidden_size"] == 4 * 192
    assert config["num_key_value_heads"] == 8
    assert not config["tie_word_embeddings"]
    assert (tmp_path / "tokenizer.json").is_file()
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 14 * (DEMO_MODEL / "model.safetensors").stat().st_size


def test_what_cannot_be_widened(tmp_path):
    with pytest.raises(WidenError, match="no checkpoint"):
        widen(tmp_path, tmp_path / "out", 2)
    with pytest.raises(WidenError, match="factor=0"):
        widen(DEMO_MODEL, tmp_path / "out", 0)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(WidenError, match="checkpoint of gpt2; allowed are llama"):
        widen(tmp_path, tmp_path / "out", 2)
