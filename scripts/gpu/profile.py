"""One request's rounds under torch.profiler. Runs in the process of an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clasp_vllm.tools.processes import generate


def profile(llm: Any, prompts: list[list[int]], tokens: int, folder: str) -> dict[str, Any]:
    """Tables of the profiler by device and by host time, and counts per engine step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profiler(activities=activities) as seen:
        ran = generate(llm, prompts, tokens)
    averages = seen.key_averages()
    for order in ("self_device_time_total", "self_cpu_time_total"):
        table = averages.table(sort_by=order, row_limit=40, max_name_column_width=70)
        (Path(folder) / f"profile-{order}.txt").write_text(table)
    watched = (
        "cudaLaunchKernel",
        "cudaLaunchKernelExC",
        "cuLaunchKernel",
        "cuLaunchKernelEx",
        "cudaGraphLaunch",
        "cudaMemcpyAsync",
        "cudaStreamSynchronize",
        "cudaEventSynchronize",
        "cudaDeviceSynchronize",
    )
    calls = {event.key: event.count for event in averages if event.key in watched}
    host = {event.key: event.self_cpu_time_total / 1000 for event in averages if event.key in watched}
    return {"seconds": ran["seconds"], "counters": ran["counters"], "calls": calls, "host_ms": host}
