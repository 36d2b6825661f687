"""Format, lint, types, and lengths of files and functions."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from engines import ROOT


@pytest.mark.parametrize(
    "command",
    [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]],
    ids=["lint", "format", "types"],
)
def test_style(command):
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


MODULES = sorted((ROOT / "clasp_vllm").rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lengths(path: Path):
    """Longer functions say why they are."""
    text = path.read_text()
    lines = text.splitlines()
    assert len(lines) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 60:
            assert re.search(r"\bLong\b", "\n".join(lines[node.lineno : node.end_lineno])), node.name
