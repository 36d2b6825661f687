"""Which folder may import which: the algorithms know nothing of vLLM, and no folder imports upward."""

import ast
import subprocess
import sys

import pytest
from engines import ROOT

PACKAGE = ROOT / "clasp_vllm"
# Each may import those before it, and the modules beside the folders in LOWEST.
ORDER = ["skipping", "control", "drafting", "policies"]
ALLOWED = {
    "skipping": set(),
    "control": {"skipping"},
    "drafting": {"skipping", "control"},
    "policies": {"skipping", "control", "drafting"},
    "engine": {"skipping", "control", "drafting", "policies", "calibration"},
    "tools": {"skipping", "control", "drafting"},
    "calibration": {"skipping", "tools", "policies"},
    "bench": {"skipping", "control", "drafting", "policies", "tools", "engine"},
}
LOWEST = {"device", "config"}


def imported(folder: str) -> dict[str, set[str]]:
    """By the first name behind the package's, the files that import it."""
    names: dict[str, set[str]] = {}
    for path in (PACKAGE / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            for module in modules:
                parts = module.split(".")
                if parts[0] == "clasp_vllm" and len(parts) > 1:
                    names.setdefault(parts[1], set()).add(path.name)
    return names


@pytest.mark.parametrize("folder", ALLOWED)
def test_no_folder_imports_upward(folder):
    allowed = ALLOWED[folder] | LOWEST | {folder}
    assert {name: files for name, files in imported(folder).items() if name not in allowed} == {}


def test_the_algorithms_do_not_load_vllm():
    modules = [
        f"clasp_vllm.{folder}.{path.stem}"
        for folder in ORDER
        for path in (PACKAGE / folder).glob("*.py")
        if path.stem != "__init__"
    ]
    code = f"import sys, {', '.join(modules)}; print('vllm' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_unit_tests_start_no_engine():
    """Nor does a test lie outside of the three folders."""
    tests = ROOT / "tests"
    folders = {path.relative_to(tests).parts[0] for path in tests.rglob("test_*.py")}
    assert folders == {"unit", "engine", "e2e"}
    starting = {"engine_process", "running", "two_ranks", "serve"}
    for path in (tests / "unit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module != "ray":
                assert starting.isdisjoint(alias.name for alias in node.names), path
