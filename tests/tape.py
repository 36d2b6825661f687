"""A stand-in for CUDA graphs where there is no GPU: it records operations and replays them.

What it shares with a CUDA graph: arguments are memory at fixed addresses, and numbers as they were;
temporaries are gone after a replay; memory that was freed since the capture is not there any more (here an
error, on a GPU whatever lies there now); the host cannot read a tensor of the device while recording. What it
cannot show: whether a capture is legal on a GPU, what libraries do in one, and time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class TapeError(RuntimeError):
    """Something that a CUDA graph could not do, or would do wrongly."""


@dataclass(frozen=True)
class _View:
    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> _View:
        size, stride = tuple(tensor.size()), tuple(tensor.stride())
        return cls(_key(tensor), tensor.dtype, size, stride, tensor.storage_offset())

    def on(self, storage: torch.UntypedStorage) -> Tensor:
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Tape(TorchDispatchMode):
    """Records what is done under it. ``replay`` does it again."""

    # The memory that stands for the device's, of all tapes: what is computed from it is too.
    _device: ClassVar[dict[int, StorageWeakRef]] = {}

    def __init__(self, device: Iterable[Tensor]) -> None:
        """``device``: tensors that stand for those of the device."""
        super().__init__()
        self._device.update({_key(x): StorageWeakRef(x.untyped_storage()) for x in device})
        self._operations: list[tuple[Any, list[Any], Any, list[Any]]] = []
        self._references: dict[int, StorageWeakRef] = {}
        self._made: set[int] = set()
        self._alive: list[Any] = []  # while recording, so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs, spec = tree_flatten((args, kwargs or {}))
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        on_device = any(_key(x) in self._device for x in tensors)
        if on_device and func in READS:
            raise TapeError(f"the host reads a tensor of the device: {func}")
        outputs = func(*args, **(kwargs or {}))
        if tensors and not on_device:
            return outputs  # of the host, which no graph sees
        made = [x for x in tree_flatten(outputs)[0] if isinstance(x, Tensor)]
        known = {_key(x) for x in tensors}
        for x in (*tensors, *made):
            self._references.setdefault(_key(x), StorageWeakRef(x.untyped_storage()))
            self._alive.append(x)
        fresh = {_key(x) for x in made} - known - self._made
        self._made |= fresh
        self._device.update({_key(x): self._references[_key(x)] for x in made})
        views = [_View.of(x) if isinstance(x, Tensor) else x for x in inputs]
        self._operations.append((func, views, spec, [_View.of(x) for x in made]))
        return outputs

    def finish(self) -> None:
        """End the recording: what nobody else holds is a temporary."""
        self._alive.clear()

    def replay(self) -> None:
        """Do everything again."""
        local: dict[int, torch.UntypedStorage] = {}

        def storage(key: int) -> torch.UntypedStorage:
            if key in local:
                return local[key]
            if self._references[key].expired():
                raise TapeError(f"{func} reads or writes memory that was freed after the capture")
            return torch.UntypedStorage._new_with_weak_ptr(self._references[key].cdata)

        for func, views, spec, results in self._operations:
            inputs = [v.on(storage(v.storage)) if isinstance(v, _View) else v for v in views]
            args, kwargs = tree_unflatten(inputs, spec)
            outputs = [x for x in tree_flatten(func(*args, **kwargs))[0] if isinstance(x, Tensor)]
            known = {v.storage for v in views if isinstance(v, _View)}
            for view, output in zip(results, outputs, strict=True):
                if view.storage in known or view.storage not in self._made:
                    continue
                if self._references[view.storage].expired():  # a temporary
                    local[view.storage] = output.untyped_storage()
                elif tuple(output.shape) == view.size:
                    view.on(storage(view.storage)).copy_(output)
                # Else the operation is none that a graph could hold: see who records.


def recorded(work: Any, device: Iterable[Tensor]) -> Tape:
    """A tape of the work."""
    tape = Tape(device)
    with tape:
        work()
    tape.finish()
    return tape


def poison(tensors: Iterable[Tensor]) -> None:
    """Fill with what no result may come from: a capture on a GPU computes nothing."""
    for tensor in tensors:
        tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
