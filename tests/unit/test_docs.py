"""Documents: the site builds, links lead somewhere, lines are short."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from engines import ROOT

from clasp_vllm.cli import key_table

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "scripts").rglob("*.md")])
LONGEST = 120


def test_the_site_builds(tmp_path):
    """Strictly: with no broken link, anchor or page that the navigation lacks."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page: Path):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path = target.partition("#")[0]
        if path and "://" not in path:
            assert (page.parent / path).exists(), target
    fenced = False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        table = line.startswith("|")
        assert len(line) <= LONGEST or table or fenced or "http" in line, line


def test_predictions_are_what_the_script_prints():
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "predict.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == (ROOT / "docs" / "predictions.md").read_text()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_the_table_of_keys_is_the_schemas():
    assert key_table() in (ROOT / "docs" / "configuration.md").read_text()
