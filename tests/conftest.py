"""Paths, and the order of the tests: fast and pure ones first."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = ["test_config", "skipping", "drafting", "test_cli", "engine", "test_server", "test_demo"]

    def rank(item: pytest.Item) -> int:
        path = str(item.path.relative_to(ROOT / "tests"))
        return next((i for i, part in enumerate(order) if path.startswith(part)), -1)

    items.sort(key=rank)
