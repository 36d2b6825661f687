"""Lengths of prompt-lookup matches, where the host knows them late and where it knows them at once."""

import numpy as np
import torch

from clasp_vllm.control.ngram_lengths import NgramLengthPredictor


def predict(
    predictor: NgramLengthPredictor, slots: list[int], match_lengths: list[int], started: tuple[int, ...] = ()
) -> list[int]:
    return predictor.predict(np.array(slots), started, torch.tensor(match_lengths)).tolist()


def test_on_the_host_it_is_what_there_is():
    predictor = NgramLengthPredictor(4, late=False)
    assert predict(predictor, [0, 1], [3, 0], (0, 1)) == [3, 0]
    assert predict(predictor, [1], [2]) == [2]


def test_on_the_device_it_is_what_there_was():
    predictor = NgramLengthPredictor(4, late=True)
    assert predict(predictor, [0, 1], [3, 0], (0, 1)) == [0, 0]
    assert predict(predictor, [1, 0], [4, 1]) == [0, 3]
    assert predict(predictor, [0, 1], [0, 0]) == [1, 4]


def test_one_that_was_away_is_expected_to_go_on():
    predictor = NgramLengthPredictor(4, late=True)
    predict(predictor, [0, 1], [3, 2], (0, 1))
    predict(predictor, [1], [2])
    assert predict(predictor, [0, 1], [0, 0]) == [3, 2]


def test_a_new_sequence_does_not_inherit():
    """Not even if the one that had the slot before ended a round ago."""
    predictor = NgramLengthPredictor(4, late=True)
    predict(predictor, [0, 1], [3, 2], (0, 1))
    assert predict(predictor, [0, 1], [1, 1], (0,)) == [0, 2]
