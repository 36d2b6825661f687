"""Decisions made on the device and acted on by the host, without the host waiting for them.

Which layers to run and when to stop drafting are control flow, so the host has to know. On a GPU it
learns late: a mask is applied one round after it was found (neighbouring tokens want similar masks),
and a draft may run one step further than it had to. Every rank follows the same rule, so ranks
that run the layers together never part ways. On a CPU there is nothing to wait for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


class HostCopy:
    """A tensor on its way from the device to the host."""

    def __init__(self, tensor: Tensor) -> None:
        if tensor.device.type == "cpu":
            self._host, self._event = tensor, None
        else:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.current_stream().record_event()

    def get(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host


class Handover:
    """Tensors that one round computes on the device and the host uses from the next (on a CPU: at once)."""

    def __init__(self) -> None:
        self._pending: dict[str, HostCopy] | None = None
        self.always_late = False  # on a CPU too, for tests

    def put(self, tensors: Mapping[str, Tensor]) -> bool:
        """Hand over the tensors of a round; whether they are to be taken at once."""
        self._pending = {name: HostCopy(tensor.contiguous()) for name, tensor in tensors.items()}
        return not self.always_late and all(tensor.device.type == "cpu" for tensor in tensors.values())

    def take(self) -> dict[str, Tensor] | None:
        """What was put last, once."""
        pending, self._pending = self._pending, None
        return None if pending is None else {name: copy.get() for name, copy in pending.items()}


class HostFlag:
    """A condition of a loop that is computed on the device.

    On a GPU ``update`` answers with the flag of two steps before, which has finished, while the step
    before and the one just launched keep the device busy.
    """

    def __init__(self, device: torch.device) -> None:
        self._lag = 0 if device.type == "cpu" else 2
        self._flags: list[HostCopy] = []

    def update(self, flag: Tensor) -> bool:
        """Take the flag of this step ([] bool); say whether to go on."""
        self._flags.append(HostCopy(flag))
        return len(self._flags) <= self._lag or bool(self._flags.pop(0).get())


class DeviceEvent:
    """A moment in the device's work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._event: Any = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()
        self._time = time.perf_counter()

    def reached(self) -> bool:
        """Whether the device has come to it."""
        return self._event is None or bool(self._event.query())

    def seconds_since(self, earlier: DeviceEvent) -> float:
        """Both must have been reached."""
        if self._event is None:
            return self._time - earlier._time
        return float(earlier._event.elapsed_time(self._event)) / 1000


def synchronize(device: torch.device) -> None:
    """Wait for the device, where there is something to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An array of the host on the device, without waiting for it."""
    return from_host(torch.from_numpy(array), device)


def from_host(tensor: Tensor, device: torch.device) -> Tensor:
    """The same of a tensor of the host."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # a copy of more than some 64 KB from other memory waits for the stream
    return tensor.to(device, non_blocking=True)


def rows_index(rows: np.ndarray, of: int, device: torch.device) -> slice | Tensor:
    """An index for some of ``of`` rows, on the device: one on the host would make it wait."""
    return slice(None) if len(rows) == of else to_device(rows, device)
