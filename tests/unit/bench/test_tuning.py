"""The command tune: from what was chosen to a table, a picture and a configuration."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from clasp_vllm.bench.tuning import ChoiceRecorder, Tuned, draw, recommend, table
from clasp_vllm.cli import main
from clasp_vllm.control.planner import Choice

ONE = Tuned("int8", 1, 4, 5, 3, None, 1.40, 1.0, 3.2, 0.020, 0.008)
FOUR = replace(ONE, requests=4, ratio=1.10, length=2, ngram=0)
MANY = replace(ONE, requests=32, ratio=0.80, drafted=0.0, accepted=0.0)
TARGET = [replace(one, weights="target", ratio=one.ratio - 0.2) for one in (ONE, FOUR, MANY)]
CONFIGS = {weights: {"method": "clasp", "draft_weights": weights} for weights in ("target", "int8")}


def test_the_best_weights_over_all_loads_and_as_many_tokens_as_are_chosen():
    config, why = recommend([*TARGET, ONE, FOUR, MANY], CONFIGS)
    assert config == {"method": "clasp", "draft_weights": "int8", "num_speculative_tokens": 5}
    assert "1.40 at 1, 1.10 at 4" in why
    assert "32" not in why


def test_off_is_as_good_as_plain_decoding():
    """So weights that gain at one load are better than those that lose less at another."""
    worse_when_off = [replace(ONE, ratio=1.3), replace(MANY, ratio=0.1)]
    config, _ = recommend([*TARGET, *worse_when_off], CONFIGS)
    assert config["draft_weights"] == "int8"


def test_where_nothing_pays_it_says_so():
    config, why = recommend([replace(MANY, requests=8), MANY], CONFIGS)
    assert config == CONFIGS["int8"]
    assert "No drafts pay at 8, 32 requests" in why


def test_table_and_picture(tmp_path):
    lines = table([MANY, ONE]).splitlines()
    assert lines[2].startswith("| 1 | int8 | 1.40 | 4 | 5 | 3 | all | 100% | 3.20 | 20.0 | 8.0 |")
    assert lines[3].startswith("| 32 | int8 | off (0.80 at best) |")
    draw([*TARGET, ONE, FOUR, MANY], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_what_drafts_gain_is_counted():
    """Of two requests: six plain steps, and a round of 1.5 plain steps that makes 2 + 3 tokens."""
    total = SimpleNamespace(plain_steps=10)
    controller = SimpleNamespace(last=Choice(0, 0, ratio=0.9), step_seconds=lambda requests: (0.02, 0.01))
    drafter = SimpleNamespace(controller=controller, statistics=SimpleNamespace(total=total))
    recorder = ChoiceRecorder(drafter, requests=2)
    off: Any = SimpleNamespace(choice=Choice(0, 0))
    drafted: Any = SimpleNamespace(choice=Choice(1, 3, seconds=0.03))
    batch: Any = range(2)
    recorder.round_ended(batch, off)
    assert recorder.ratio() == 0.9
    recorder.round_ended(batch, drafted)
    recorder.verified(["a", "b"], np.array([4, 4]), torch.tensor([2, 1]))
    recorder.verified(["a", "b"], np.array([1, 1]), None)
    total.plain_steps += 6
    assert recorder.plain_steps == 6
    assert recorder.ratio() == pytest.approx((6 + 2.5) / (6 + 1.5))


@pytest.mark.parametrize("weights", ["int9", "target,int3"])
def test_wrong_weights_are_refused_before_anything_is_loaded(weights, capsys):
    assert main(["tune", "no such model", "--draft-weights", weights]) == 2
    error = capsys.readouterr().err
    assert weights.split(",")[-1] in error
    assert "draft_weights" in error
