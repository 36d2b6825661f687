"""The picture of the layers that requests skip: from masks to letters."""

import numpy as np

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


def test_a_bad_configuration_is_refused(capsys):
    from clasp_vllm.cli import main

    assert main(["inspect", "model", "--speculative-config", "nothing.yaml"]) == 2
    assert "nothing.yaml" in capsys.readouterr().err
