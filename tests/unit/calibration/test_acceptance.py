"""The score of a fixed mask: what drafting with it would have accepted, position by position."""

import json

import pytest
import torch
from engines import DEMO_MODEL, PROMPTS
from opponent import Opponent, Past

from clasp_vllm.calibration.acceptance import Acceptance
from clasp_vllm.cli import main


def accepted_one_by_one(prompt: str, num_tokens: int, skipped: frozenset[int]) -> list[bool]:
    """First draft tokens at each position of the model's answer, by the slow loop."""
    from transformers import AutoTokenizer

    opponent = Opponent(DEMO_MODEL)
    tokens = AutoTokenizer.from_pretrained(DEMO_MODEL).encode(prompt)
    with torch.inference_mode():
        past, token = opponent._read(tokens)
        accepted = []
        for _ in range(num_tokens - 1):
            draft, _ = opponent._choose(opponent._step(Past(past.keys, past.values), token, skipped))
            token, _ = opponent._choose(opponent._step(past, token, frozenset()))
            accepted.append(draft == token)
    return accepted


def test_all_positions_at_once_are_those_one_by_one():
    prompts, skipped = PROMPTS[:3], frozenset({2, 5, 6, 11, 17, 20})
    acceptance = Acceptance(str(DEMO_MODEL), prompts, num_tokens=20)
    assert acceptance(frozenset()) == 1.0
    slow = [same for prompt in prompts for same in accepted_one_by_one(prompt, 20, skipped)]
    assert acceptance(skipped) == pytest.approx(sum(slow) / len(slow), abs=0.04)
    assert acceptance(frozenset(range(1, 23))) < acceptance(skipped) < 1.0


def test_sublayers_of_whole_layers_are_these():
    acceptance = Acceptance(str(DEMO_MODEL), PROMPTS[:2], num_tokens=12)
    layers = frozenset({2, 5, 11, 17})
    both = frozenset(2 * layer + part for layer in layers for part in (0, 1))
    assert acceptance.of_sublayers(both) == acceptance(layers) < 1.0
    assert acceptance.of_sublayers(frozenset()) == 1.0  # nothing is left of the last call
    assert acceptance.of_sublayers(both - {2 * layer for layer in layers}) > acceptance(layers)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--num-skipped-layers=24"], "--num-skipped-layers 24: allowed are 1 to 23"),
        (["--num-skipped-layers=2", "--prompts=missing.jsonl"], "--prompts missing.jsonl"),
    ],
)
def test_bad_options(options, part, capsys):
    assert main(["search", str(DEMO_MODEL), "--max-tokens=2", *options]) == 2
    assert part in capsys.readouterr().out


def test_command(tmp_path, capsys):
    path = tmp_path / "search.json"
    arguments = ["search", str(DEMO_MODEL), "--num-skipped-layers=12", "--trials=6", "--max-tokens=8"]
    assert main([*arguments, f"--json={path}"]) == 0
    config = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert config["method"] == "layer_skip"
    assert len(config["skip_layers"]) == 12
    search = json.loads(path.read_text())
    assert len(search["trials"]) == 6
    assert search["best"] >= search["evenly_spaced"]
