"""Make a small model as expensive as a large one without changing what it computes.

Every channel, head and hidden unit is repeated ``factor`` times and every projection divided by
``factor`` on its input side: each copy then computes what the original did, so outputs and layer-skipping
acceptance are those of the small model, while a token costs ``factor`` squared times the weights
to read. It is for measuring speed where no large model can be had.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

KINDS = ("llama", "mistral", "qwen2", "qwen3")

# Of transformers' Llama family. Those not in a config keep the width that follows from the others.
_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


class WidenError(ValueError):
    """The checkpoint cannot be widened. The message is for the user."""


def widen(source: Path, target: Path, factor: int) -> None:
    """Write the checkpoint ``source``, made ``factor`` times as wide, to ``target``.

    The result is exact but for the rounding of longer sums; with a power of two the weights are exact too.
    Tied embeddings are untied, because the head is a projection and the embedding is not.

    Raises:
        WidenError: not a checkpoint of the Llama family in the safetensors format, or quantised.
    """
    if factor < 1:
        raise WidenError(f"factor={factor}: allowed are integers from 1 on")
    files = sorted(source.glob("*.safetensors"))
    if not files or not (source / "config.json").is_file():
        raise WidenError(f"{str(source)!r} is no checkpoint: it has no config.json or no *.safetensors")
    config = json.loads((source / "config.json").read_text())
    kind = str(config.get("model_type")) + (", quantised" if "quantization_config" in config else "")
    if kind not in KINDS:
        raise WidenError(f"{str(source)!r} is a checkpoint of {kind}; allowed are {', '.join(KINDS)}")
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])

    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config |= {name: config[name] * factor for name in _WIDTHS if name in config}
    config["tie_word_embeddings"] = False

    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja", ".model", ".txt"):
            shutil.copyfile(file, target / file.name)
    (target / "model.safetensors.index.json").unlink(missing_ok=True)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    widened = {name: widen_weight(name, weight, factor) for name, weight in weights.items()}
    save_file(widened, target / "model.safetensors", metadata={"format": "pt"})


def widen_weight(name: str, weight: Tensor, factor: int) -> Tensor:
    """One parameter, by its name in transformers' Llama family."""
    if name.endswith(("q_norm.weight", "k_norm.weight")):  # over one head, and heads keep their size
        return weight
    if weight.dim() == 1:  # norms and biases: [n] to [factor * n]
        return weight.repeat(factor)
    if name.endswith("embed_tokens.weight"):
        return weight.repeat(1, factor)
    scaled = (weight.float() / factor).to(weight.dtype)
    if name.startswith("lm_head"):
        return scaled.repeat(1, factor)
    if name.endswith("_proj.weight"):
        return scaled.repeat(factor, factor)
    raise WidenError(f"parameter {name!r} is not known in the Llama family")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("model", type=Path, help="folder of a checkpoint of the Llama family")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--factor", type=int, default=8, help="times as wide (default %(default)s)")


def main(args: argparse.Namespace) -> int:
    """The command; returns its exit status."""
    try:
        widen(args.model, args.output, args.factor)
    except WidenError as error:
        print(f"clasp-vllm: error: {error}", file=sys.stderr)
        return 2
    return 0
