"""The command tune: from what was chosen to a table, a picture and a configuration."""

from dataclasses import replace

import pytest

from clasp_vllm.bench.tuning import Tuned, draw, recommend, table
from clasp_vllm.cli import main

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


@pytest.mark.parametrize("weights", ["int9", "target,int3"])
def test_wrong_weights_are_refused_before_anything_is_loaded(weights, capsys):
    assert main(["tune", "no such model", "--draft-weights", weights]) == 2
    error = capsys.readouterr().err
    assert weights.split(",")[-1] in error
    assert "draft_weights" in error
