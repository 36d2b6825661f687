"""Which checkpoint a model's weights are, told without loading it."""

from __future__ import annotations

import hashlib
from pathlib import Path


def fingerprint(model: str, revision: str | None = None) -> str | None:
    """Hex digest of the first rows of all tensors of a checkpoint, their names, shapes and types.

    Args:
        model: a folder, or a name of which the files are in the local cache.

    Returns:
        None where there are no safetensors files.
    """
    from safetensors import safe_open

    folder = _folder(model, revision)
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    found: dict[str, bytes] = {}
    for file in files:
        with safe_open(file, framework="pt") as checkpoint:
            for name in checkpoint.keys():  # noqa: SIM118 - not a dict
                part = checkpoint.get_slice(name)
                shape = part.get_shape()
                row = part[:1] if shape else checkpoint.get_tensor(name)
                text = f"{name} {shape} {row.dtype} {row.flatten().float().tolist()}"
                found[name] = hashlib.sha256(text.encode()).digest()
    if not found:
        return None
    return hashlib.sha256(b"".join(found[name] for name in sorted(found))).hexdigest()


def _folder(model: str, revision: str | None) -> Path | None:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None
