"""A calibration on disk: the tasks, what each skips, and the anchors that prompts are matched with.

A folder of ``manifest.json`` and ``anchors.safetensors``. It holds for one model, told by its checkpoint's
fingerprint; a quantised one by the weights of its norms, which most quantisation leaves as they are. (AWQ and
SmoothQuant fold scales into them: such a model wants a calibration of its own.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clasp_vllm.config import ConfigError
from clasp_vllm.policies.anchors import Anchors

FORMAT = 2
LARGEST = 1 << 20  # bytes of a manifest
SAME_NORMS = 0.005  # mean difference, relative, up to which norms are the same in another precision


class Task(BaseModel):
    """What was found for one task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    skip_attention: list[int] = Field(description="Layers whose attention is skipped.")
    skip_mlp: list[int] = Field(description="Layers whose MLP is skipped.")
    acceptance: float = Field(description="Of first draft tokens, on the prompts calibrated with.")
    speedup: float = Field(description="What that promises at the cost of the sub-layers left.")
    trials: int = Field(description="Sets tried.")

    def mask(self, num_layers: int) -> Tensor:
        """[num_layers, 2] bool, True = skipped."""
        mask = torch.zeros(num_layers, 2, dtype=torch.bool)
        mask[self.skip_attention, 0] = True
        mask[self.skip_mlp, 1] = True
        return mask


class Manifest(BaseModel):
    """What a calibration holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = Field(description="Version of the format.")
    model: str = Field(description="Name or path of the model calibrated for.")
    fingerprint: str | None = Field(description="Of its checkpoint; None: it has no safetensors files.")
    num_layers: int
    hidden_size: int
    tasks: list[Task] = Field(description="The last one is for prompts that are of none of the others.")
    silhouette: float | None = Field(description="Of the embeddings by task: 1 = far apart, 0 = mixed up.")
    settings: dict[str, int | float | str] = Field(description="Of the calibration.")
    versions: dict[str, str]


class Calibration:
    """A calibration that has been read.

    Attributes:
        manifest: what it holds.
        anchors: of all tasks but the last.
        norms: [2 num_layers + 1, hidden_size] float32, weights of the model's norms.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read it.

        Raises:
            ConfigError: there is none, or it is damaged.
        """
        self.folder = Path(folder).expanduser()
        try:
            path = self.folder / "manifest.json"
            if path.stat().st_size > LARGEST:
                raise OSError(f"{path.name} has {path.stat().st_size} bytes; allowed are {LARGEST} at most")
            self.manifest = Manifest.model_validate_json(path.read_text("utf-8"))
            tensors = load_file(self.folder / "anchors.safetensors")
            self.anchors = Anchors(tensors["vectors"], tensors["tasks"], tensors["least"])
            self.norms = tensors["norms"]
        except (OSError, UnicodeError, ValidationError, SafetensorError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"calibration={str(folder)!r} cannot be read: {reason}; "
                "make one with `clasp-vllm calibrate MODEL --output FOLDER`"
            ) from None
        if self.manifest.format != FORMAT:
            raise ConfigError(
                f"calibration={str(folder)!r} has format {self.manifest.format}; allowed is {FORMAT}: "
                "make it again with this version's `clasp-vllm calibrate`"
            )
        wrong = self._wrong()
        if wrong is not None:
            raise ConfigError(f"calibration={str(folder)!r} is damaged: {wrong}; make it again")

    def _wrong(self) -> str | None:
        """What cannot be in its contents, or None."""
        layers, tasks, vectors = self.manifest.num_layers, self.anchors.tasks, self.anchors.vectors
        if len(self.manifest.tasks) < 2:
            return "it has no tasks"
        for task in self.manifest.tasks:
            if any(not 0 <= layer < layers for layer in (*task.skip_attention, *task.skip_mlp)):
                return f"{task.name} skips layers that the model does not have"
        if vectors.ndim != 2 or len(vectors) == 0 or vectors.shape[1] != self.manifest.hidden_size:
            return f"its anchors are of shape {tuple(vectors.shape)}"
        if (
            tasks.dtype != torch.int64
            or tasks.shape != vectors.shape[:1]
            or not 0 <= int(tasks.min()) <= int(tasks.max()) < (len(self.manifest.tasks) - 1)
        ):
            return "its anchors are of tasks that it does not have"
        if self.anchors.least.shape != tasks.shape:
            return "it does not say how near its anchors are"
        if self.norms.shape != (2 * layers + 1, self.manifest.hidden_size):
            return f"its norms are of shape {tuple(self.norms.shape)}"
        for name, tensor in (("anchors", vectors), ("anchors", self.anchors.least), ("norms", self.norms)):
            if tensor.dtype != torch.float32 or not tensor.isfinite().all():
                return f"not all of its {name} are numbers"
        return None

    def check_shape(self, num_layers: int, hidden_size: int) -> None:
        """Raises ConfigError where a model has another shape than the one calibrated for."""
        mine = self.manifest.num_layers, self.manifest.hidden_size
        if mine != (num_layers, hidden_size):
            raise self._of_another(
                f"which has {mine[0]} layers of width {mine[1]}; this one has {num_layers} of {hidden_size}"
            )

    def check_model(self, norms: Sequence[Tensor]) -> None:
        """Raises ConfigError where a model has other norms than the one calibrated for."""
        stacked = stack_norms(norms)
        if stacked.shape == self.norms.shape:
            off = (stacked - self.norms).abs().mean() / self.norms.abs().mean().clamp(min=1e-9)
            if float(off) < SAME_NORMS:
                return
        raise self._of_another("whose norms have other weights than this one's")

    def check_checkpoint(self, fingerprint: str | None) -> None:
        """Raises ConfigError where a checkpoint has another fingerprint than the one calibrated for."""
        if None not in (fingerprint, self.manifest.fingerprint) and fingerprint != self.manifest.fingerprint:
            raise self._of_another("whose checkpoint has other weights than this one's")

    def _of_another(self, difference: str) -> ConfigError:
        return ConfigError(
            f"calibration={str(self.folder)!r} is of another model, {self.manifest.model}, {difference}. "
            "Calibrate for this model with `clasp-vllm calibrate`"
        )

    def masks(self) -> Tensor:
        """[tasks, num_layers, 2] bool, True = skipped."""
        return torch.stack([task.mask(self.manifest.num_layers) for task in self.manifest.tasks])


def save(folder: Path, manifest: Manifest, anchors: Anchors, norms: Tensor) -> None:
    """Write a calibration."""
    tensors = {"vectors": anchors.vectors, "tasks": anchors.tasks, "least": anchors.least, "norms": norms}
    save_file(tensors, folder / "anchors.safetensors")
    (folder / "manifest.json").write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")


def stack_norms(norms: Sequence[Tensor]) -> Tensor:
    """The weights of a model's norms, layer by layer those before attention and MLP, and the last, in one."""
    return torch.stack([weight.detach().float().cpu() for weight in norms])
