"""How ``vllm serve`` refuses: one clear line, before anything is loaded."""

import os
import subprocess
import sys

import pytest
from engines import DEMO_MODEL

VLLM = os.path.join(os.path.dirname(sys.executable), "vllm")


def vllm(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [VLLM, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        pytest.param("nowhere.yaml", ["'nowhere.yaml'", "no such file"], marks=pytest.mark.slow),
        ('{"method": "clasp", "skip_raito": 0.5}', ["skip_raito=0.5", "did you mean skip_ratio"]),
        pytest.param(
            '{"method": "clasp", "num_skipped_layers": 24}',
            ["num_skipped_layers", "24", "0 to 23"],
            marks=pytest.mark.slow,
        ),
        pytest.param('{"method": "klasp"}', ["method='klasp'", "clasp", "ngram"], marks=pytest.mark.slow),
    ],
)
def test_serve_refuses_before_loading(config, parts):
    result = vllm("serve", str(DEMO_MODEL), "--speculative-config", config)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert "Starting to load model" not in result.stdout + result.stderr
    message = result.stderr.strip().splitlines()[-1]
    for part in parts:
        assert part in message
