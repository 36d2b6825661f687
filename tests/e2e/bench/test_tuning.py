"""The command tune on the demo model."""

import subprocess
import sys

import pytest
from engines import DEMO_MODEL

from clasp_vllm.config import parse_config, read_settings

pytestmark = pytest.mark.slow


def test_command(tmp_path):
    command = [sys.executable, "-m", "clasp_vllm.cli", "tune", str(DEMO_MODEL), "--requests=1,3,9"]
    options = ["--draft-weights=target,int8", "--max-tokens=48", f"--output={tmp_path / 'clasp.yaml'}"]
    engine = [
        "--dtype=float32",
        "--enforce-eager",
        "--max-model-len=512",
        "--kv-cache-memory-bytes=268435456",
    ]
    engine += ["--max-num-seqs=4"]
    run = subprocess.run(
        [*command, *options, f"--plot={tmp_path / 'tune.png'}", "--", *engine],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    rows = [line.split(" | ") for line in run.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[:2] for row in rows] == [[f"| {n}", w] for n in (1, 3) for w in ("target", "int8")]
    assert run.stderr.count("no round had 9 requests: --max-num-seqs may be lower") == 2
    assert (tmp_path / "tune.png").read_bytes().startswith(b"\x89PNG")
    config = parse_config(read_settings(str(tmp_path / "clasp.yaml")))
    assert config.method == "clasp"
