"""What the host expects the context to offer, where it knows late and where it knows at once."""

import numpy as np
import torch

from clasp_vllm.control.ngram_lengths import NgramLengthPredictor


def predict(
    offers: NgramLengthPredictor, slots: list[int], match_lengths: list[int], started: tuple[int, ...] = ()
) -> list[int]:
    return offers.predict(np.array(slots), started, torch.tensor(match_lengths)).tolist()


def test_on_the_host_it_is_what_there_is():
    offers = NgramLengthPredictor(4, late=False)
    assert predict(offers, [0, 1], [3, 0], (0, 1)) == [3, 0]
    assert predict(offers, [1], [2]) == [2]


def test_on_the_device_it_is_what_there_was():
    offers = NgramLengthPredictor(4, late=True)
    assert predict(offers, [0, 1], [3, 0], (0, 1)) == [0, 0]
    assert predict(offers, [1, 0], [4, 1]) == [0, 3]
    assert predict(offers, [0, 1], [0, 0]) == [1, 4]


def test_one_that_was_away_is_expected_to_go_on():
    offers = NgramLengthPredictor(4, late=True)
    predict(offers, [0, 1], [3, 2], (0, 1))
    predict(offers, [1], [2])
    assert predict(offers, [0, 1], [0, 0]) == [3, 2]


def test_a_new_sequence_does_not_inherit():
    """Not even if the one that had the slot before ended a round ago."""
    offers = NgramLengthPredictor(4, late=True)
    predict(offers, [0, 1], [3, 2], (0, 1))
    assert predict(offers, [0, 1], [1, 1], (0,)) == [0, 2]
