"""The ledger of hooks names those that there are; when a drafter starts."""

import ast
import re
from types import SimpleNamespace

import torch
from engines import ROOT
from vllm.v1.worker.workspace import WorkspaceManager

from clasp_vllm.engine.hooks import _warm_up


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


def test_the_first_draft_comes_before_vllm_locks_its_workspace():
    """Marlin's first product adds locks to it. Only GPUs have Marlin: a draft step here stands for one."""
    workspace = WorkspaceManager(torch.device("cpu"))

    def step(*_) -> None:
        workspace.get_persistent("marlin_locks", (4,), torch.int, zero_init=True)

    def compile_or_warm_up_model(self) -> str:
        workspace.lock()
        return "times"

    drafter = SimpleNamespace(passes=SimpleNamespace(try_out=step), start=step)
    worker = SimpleNamespace(
        vllm_config=SimpleNamespace(speculative_config=SimpleNamespace(layer_skip=object())),
        model_runner=SimpleNamespace(drafter=SimpleNamespace(drafter=drafter)),
        device=torch.device("cpu"),
    )
    assert _warm_up(compile_or_warm_up_model)(worker) == "times"
