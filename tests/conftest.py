"""Paths, the order of the tests (fast and pure ones first), and who shares a machine with whom.

With ``pytest -n 2 --dist loadfile`` each worker's engines keep to a core of their own.
"""

import os
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

if "PYTEST_XDIST_WORKER" in os.environ:
    core = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % (os.cpu_count() or 1)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(core)
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.relative_to(TESTS).parts[0], reverse=True)  # unit, engine, e2e
    for item in items:
        if item.get_closest_marker("slow_on_v2") and "v2" in getattr(item, "callspec", item).params.values():
            item.add_marker("slow")
