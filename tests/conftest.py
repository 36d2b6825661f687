"""The order of the tests (fast and pure ones first), their markers, and who shares a machine with whom.

With ``pytest -n 2 --dist loadfile`` each worker's engines keep to a core of their own.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

if "PYTEST_XDIST_WORKER" in os.environ:
    core = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % (os.cpu_count() or 1)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(core)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Ranks wait for each other at every layer, and take many times as long where one has no core."""
    alone = item.get_closest_marker("both_cores") is not None
    with open(Path(tempfile.gettempdir()) / f"clasp_vllm_tests_{os.getuid()}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        return (yield)


def folder(item: pytest.Item) -> str:
    return item.path.relative_to(TESTS).parts[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=folder, reverse=True)  # unit, engine, e2e
    for item in items:
        if folder(item) != "unit":
            item.add_marker("engine")
        if item.path.stem.startswith("test_ray"):
            item.add_marker("ray")
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(isinstance(value, str) and value == "v2" for value in parameters):
            item.add_marker("v2")
        if item.get_closest_marker("v2") and item.get_closest_marker("slow_on_v2"):
            item.add_marker("slow")
