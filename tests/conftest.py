"""Paths, the order of the tests (fast and pure ones first), and who shares a machine with whom.

With ``pytest -n 2 --dist loadfile`` each worker's engines keep to a core of their own.
"""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

if "PYTEST_XDIST_WORKER" in os.environ:
    core = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % (os.cpu_count() or 1)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(core)
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = ["test_config", "skipping", "drafting", "test_cli", "engine", "test_server", "test_demo"]

    def rank(item: pytest.Item) -> int:
        path = str(item.path.relative_to(ROOT / "tests"))
        return next((i for i, part in enumerate(order) if path.startswith(part)), -1)

    items.sort(key=rank)
    for item in items:
        if item.get_closest_marker("slow_on_v2") and "v2" in getattr(item, "callspec", item).params.values():
            item.add_marker("slow")
