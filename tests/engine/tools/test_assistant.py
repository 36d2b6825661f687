"""The real assistant in an engine."""

import os
import subprocess
import sys

import pytest
from engines import ROOT


@pytest.mark.slow
def test_the_real_one():
    """Fetched, if it is not in the cache: it ends its answer itself. Needs a package index the first time."""
    code = (
        "from engines import running; from vllm import SamplingParams\n"
        "from clasp_vllm.tools.assistant import assistant\n"
        "with running(assistant('pypi')) as llm:\n"
        "    question = [{'role': 'user', 'content': 'What is the capital of France?'}]\n"
        "    answer = llm.chat(question, SamplingParams(temperature=0, max_tokens=200), use_tqdm=False)\n"
        "    output = answer[0].outputs[0]\n"
        "    print(output.finish_reason, output.text.strip())\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert "stop The capital of France is Paris" in result.stdout
