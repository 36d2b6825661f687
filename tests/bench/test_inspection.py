"""The picture of the layers that requests skip: from masks to letters, and the command on the demo model."""

import subprocess
import sys

import numpy as np
from engines import DEMO_MODEL

from clasp_vllm.bench.inspection import as_text, draw, kinds, legend


def mask(*skipped: tuple[int, int]) -> np.ndarray:
    skips = np.zeros((3, 2), dtype=bool)
    for layer, part in skipped:
        skips[layer, part] = True
    return skips


def test_letters_say_what_was_skipped():
    layers_by_round = kinds([None, mask(), mask((0, 0), (1, 1), (2, 0), (2, 1))], 3)
    assert layers_by_round.shape == (3, 3)
    assert as_text(layers_by_round) == "  0  █▄\n  1  █▀\n  2  █·"
    assert "'·' skipped" in legend(layers_by_round)
    assert "attention skipped" not in legend(kinds([mask()], 3))
    assert kinds([], 3).shape == (3, 0)


def test_picture(tmp_path):
    draw({"a": kinds([None, mask((0, 0))], 3), "b": kinds([mask()] * 5, 3)}, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


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


def test_a_bad_configuration_is_refused(capsys):
    from clasp_vllm.cli import main

    assert main(["inspect", "model", "--speculative-config", "nothing.yaml"]) == 2
    assert "nothing.yaml" in capsys.readouterr().err
