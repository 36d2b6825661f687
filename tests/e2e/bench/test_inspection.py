"""The command inspect on the demo model."""

import subprocess
import sys

from engines import DEMO_MODEL


def test_command(tmp_path):
    path = tmp_path / "layers.png"
    config = '{"method": "clasp", "adaptive": false, "num_skipped_layers": 12}'
    prompts = ["--prompt=def parse(self, text):", "--prompt=Mr. Bennet was"]
    command = [sys.executable, "-m", "clasp_vllm.cli", "inspect", str(DEMO_MODEL), *prompts]
    options = ["--max-tokens=12", f"--output={path}", f"--speculative-config={config}"]
    engine = ["--dtype=float32", "--enforce-eager", "--max-model-len=256", "--kv-cache-memory-bytes=67108864"]
    run = subprocess.run(
        [*command, *options, "--", *engine], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    assert path.read_bytes().startswith(b"\x89PNG")
    for number, prompt in enumerate(("def parse(self, text):", "Mr. Bennet was"), start=1):
        _, _, rest = run.stdout.partition(f"{number}. {prompt}")
        columns = [line[4:] for line in rest.splitlines()[2:26]]
        assert len({len(column) for column in columns}) == 1
        rounds = [*zip(*columns, strict=True)]
        assert rounds
        for one in rounds:
            assert one.count("·") == 12
            assert one.count("█") == 12
