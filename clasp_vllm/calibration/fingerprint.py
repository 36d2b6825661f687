"""Which checkpoint a model's weights are, told without loading it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def fingerprint(model: str, revision: str | None = None, cache: str | None = None) -> str | None:
    """Hex digest of the first rows of all tensors of a checkpoint, their names, shapes and types.

    Args:
        model: a folder, or a name of which the files are in the local cache of the Hugging Face hub.
        revision: of a name.
        cache: where the hub's files are, if not where they are by default.

    Returns:
        None where there are no safetensors files, or not all of them.
    """
    import torch
    from safetensors import safe_open

    index = _file(model, "model.safetensors.index.json", revision, cache)
    names = {"model.safetensors"}
    if index is not None:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    digests: dict[str, bytes] = {}
    for file in (_file(model, name, revision, cache) for name in names):
        if file is None:
            return None
        with safe_open(file, framework="pt") as checkpoint:
            for name in checkpoint.keys():  # noqa: SIM118 - not a dict
                part = checkpoint.get_slice(name)
                shape = part.get_shape()
                digest = hashlib.sha256(f"{name} {shape} {part.get_dtype()}".encode())
                if 0 not in shape:
                    row = part[:1] if shape else checkpoint.get_tensor(name)
                    digest.update(row.contiguous().flatten().view(torch.uint8).numpy().tobytes())
                digests[name] = digest.digest()
    return hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()


def _file(model: str, name: str, revision: str | None, cache: str | None) -> Path | None:
    if Path(model).is_dir():
        path = Path(model) / name
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, name, cache_dir=cache, revision=revision)
    except HFValidationError:  # no name of the hub's
        return None
    return Path(cached) if isinstance(cached, str) else None
