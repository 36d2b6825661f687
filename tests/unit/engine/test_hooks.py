"""The ledger of hooks names those that there are."""

import ast
import re

from engines import ROOT


def wrapped() -> set[str]:
    """The functions that the plugin hands to ``wrap``."""
    names = set()
    for file in ("hooks.py", "runner_hooks.py"):
        for node in ast.walk(ast.parse((ROOT / "clasp_vllm" / "engine" / file).read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "wrap":
                names.add(node.args[2].id.removeprefix("_"))
    return names


def test_the_ledger_has_every_hook():
    page = (ROOT / "docs" / "developer" / "hooks.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", page, re.MULTILINE)
    assert {name for name, _ in rows} == wrapped()
    assert all(len(cells.split(" | ")) == 3 and cells.strip().split(" | ")[2] for _, cells in rows)
