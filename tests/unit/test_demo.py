"""What the demo refuses before it starts a server."""

import subprocess
import sys

from engines import ROOT

DEMO = str(ROOT / "scripts" / "demo" / "demo.py")


def test_one_model_at_a_time():
    result = subprocess.run(
        [sys.executable, DEMO, "some/model", "--tiny"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "--tiny and model some/model: only one can be served" in result.stderr
