"""Searches for the best fixed mask, on scores whose best set is known."""

from itertools import combinations

import pytest

from clasp_vllm.calibration.search import SEARCHES, Trials

LAYERS = 12


def additive(skipped: frozenset[int]) -> float:
    """Every layer costs a different amount, neighbours cost extra."""
    cost = sum((7 * layer) % LAYERS for layer in skipped)
    return -cost - 3.0 * sum(layer + 1 in skipped for layer in skipped)


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("seed", [0, 1])
def test_finds_nearly_the_best(name, seed):
    start, calls = frozenset(range(4)), []
    trials = Trials(additive, 120, lambda: calls.append(1))
    best = SEARCHES[name](trials, LAYERS, start, seed, False)
    scores = sorted((additive(frozenset(s)) for s in combinations(range(LAYERS), 4)), reverse=True)
    assert len(best) == 4
    assert start in trials.scores
    assert len(calls) == len(trials.scores) <= 120
    assert trials.scores[best] >= scores[4]  # of 495
    assert trials.scores[best] == max(trials.scores.values())


@pytest.mark.parametrize("name", SEARCHES)
def test_fewer_sets_than_trials(name):
    trials = Trials(additive, 100)
    best = SEARCHES[name](trials, 4, frozenset({0, 1}), 0, False)
    assert len(trials.scores) == 6
    assert trials.scores[best] == max(additive(frozenset(s)) for s in combinations(range(4), 2))


@pytest.mark.parametrize("name", SEARCHES)
def test_sets_of_any_size(name):
    """The best set has six layers, those whose gain is positive; the search starts from three others."""
    gains = {layer: 1.0 if layer % 2 else -1.0 for layer in range(LAYERS)}
    trials = Trials(lambda skipped: sum(gains[layer] for layer in skipped), 150)
    best = SEARCHES[name](trials, LAYERS, frozenset({0, 2, 4}), 0, True)
    assert len(best) > 3
    assert trials.scores[best] >= 4.0
    assert all(skipped for skipped in trials.scores)


def test_the_limit_holds():
    trials = Trials(additive, 1)
    trials(frozenset({1}))
    trials(frozenset({1}))
    with pytest.raises(ValueError, match="no more than 1 trials"):
        trials(frozenset({2}))
