"""What the plugin imports, wraps and overrides is in vLLM as it is installed; the ledger has every hook."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from inspect import Parameter
from types import SimpleNamespace

import torch
from engines import ROOT
from vllm.v1.worker.workspace import WorkspaceManager

from clasp_vllm.engine import hooks, runner_hooks
from clasp_vllm.engine.hooks import _warm_up


def imported_from_vllm() -> Iterator[tuple[str, str]]:
    """Module and name of each import in the package; the name is empty where it is the module itself."""
    for file in (ROOT / "clasp_vllm").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                yield from ((node.module, alias.name) for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "vllm")


def test_vllm_has_what_is_imported_from_it():
    wanted = sorted(set(imported_from_vllm()))
    assert len(wanted) > 90
    missing = []
    for module, name in wanted:
        try:
            found = importlib.import_module(module)
            if name and not hasattr(found, name):
                importlib.import_module(f"{module}.{name}")
        except ImportError as error:
            missing.append(str(error))
    assert missing == []


def parameters(function: object) -> tuple[list[str], bool]:
    """Names, and whether any other positional ones are taken."""
    of = inspect.signature(function).parameters.values()
    fixed = [p.name for p in of if p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]
    return fixed, any(p.kind is Parameter.VAR_POSITIONAL for p in of)


def test_hooks_take_what_vllm_gives(monkeypatch):
    """Each function that is wrapped is there, with parameters that the hook takes."""
    found, wrong = set(), []

    def wrap(owner, name, make):
        original = inspect.unwrap(getattr(owner, name))
        (ours, others), (theirs, any_) = parameters(make(original)), parameters(original)
        found.add(make.__name__.removeprefix("_"))
        fits = any_ or (len(ours) <= len(theirs) if others else len(ours) == len(theirs))
        if not fits:
            wrong.append(f"{name}: {theirs}, but the hook has {ours}")

    for module in (hooks, runner_hooks):
        monkeypatch.setattr(module, "wrap", wrap)
    hooks.install()
    runner_hooks.install_runner_hooks(v2=False)
    runner_hooks.install_runner_hooks(v2=True)
    runner_hooks.install_draft_weights()
    assert wrong == []
    assert found == wrapped() - {"warm_up", "new_weights"}  # which a worker wraps when it is made


def test_overridden_methods_take_what_vllm_gives():
    from clasp_vllm.engine.proposer_v1 import LayerSkipProposer
    from clasp_vllm.engine.speculator_v2 import LayerSkipSpeculator

    for ours in (LayerSkipProposer, LayerSkipSpeculator):
        for name, method in vars(ours).items():
            original = getattr(ours.__base__, name, None)
            if not inspect.isfunction(method) or not inspect.isfunction(original):
                continue
            (taken, others), (given, _) = parameters(method), parameters(original)
            assert others or set(given) <= set(taken), f"{ours.__name__}.{name}"


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
