"""Times of calls, on the host and on the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def milliseconds(work: Callable[[], Any], repeats: int = 30) -> float:
    """Of one call, the median with the device waited for after each."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    for repeat in range(repeats + 3):
        wait()
        began = time.perf_counter()
        work()
        wait()
        if repeat >= 3:
            times.append(time.perf_counter() - began)
    return 1000 * sorted(times)[len(times) // 2]


def host_milliseconds(work: Callable[[], Any], repeats: int = 30) -> float:
    """Of one call until it returns, the device not waited for."""
    import torch

    times = []
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    wait()
    return 1000 * sorted(times)[len(times) // 2]


def in_graph(works: list[Callable[[], Any]]) -> float:
    """Microseconds of one of the works, all in one CUDA graph."""
    import torch

    for work in works[:2]:
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    return 1000 * milliseconds(graph.replay, 10) / len(works)
