"""The prediction for GPUs: a script that needs none, and says that it is one."""

import re
import subprocess
import sys

from engines import ROOT


def test_prints_a_prediction():
    result = subprocess.run(
        [sys.executable, "scripts/bench/predict.py", "--overhead", "0"],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    assert "**Not measured.**" in result.stdout
    assert "Llama-3-8B" in result.stdout
    assert "Llama-3-70B" in result.stdout
    ratios = [float(text) for text in re.findall(r"to ([0-9]\.[0-9]+) \(", result.stdout)]
    assert len(ratios) > 100
    assert all(1.05 <= ratio < 3 for ratio in ratios)
