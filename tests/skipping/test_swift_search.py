"""SWIFT's search, on scores whose best set is known."""

import pytest

from clasp_vllm.skipping.swift_search import (
    BAYESIAN_EVERY,
    GOOD_ENOUGH,
    MOST_STEPS,
    PATIENCE,
    SwiftSearch,
)

GOOD = frozenset(2 * layer + part for layer in (2, 4, 6, 8, 10) for part in (0, 1))


def overlap(skipped: frozenset[int]) -> float:
    """The share of the set that is good to skip; never good enough to end the search."""
    return 0.9 * len(skipped & GOOD) / len(skipped)


def steps(search: SwiftSearch, score=overlap) -> int:
    while not search.ended:
        search.tell(candidate := search.candidate(), score(candidate))
    return search.steps


def test_sets_are_of_the_ratio_and_spare_the_outer_layers():
    search = SwiftSearch(12, 0.45)
    for _ in range(60):
        candidate = search.candidate()
        assert len(candidate) == int(20 * 0.45)
        assert candidate <= set(range(2, 22))
        search.tell(candidate, overlap(candidate))


def test_it_begins_with_what_is_used_and_keeps_the_best():
    search = SwiftSearch(12, 0.45)
    first = search.best
    assert search.candidate() == first
    assert search.tell(first, 0.5)
    other = search.candidate()
    assert other != first
    assert not search.tell(other, 0.5)
    assert search.best == first
    assert search.tell(other, 0.6)
    assert search.best == other


def test_it_finds_better_sets():
    search = SwiftSearch(12, 0.45)
    before = overlap(search.best)
    assert PATIENCE < steps(search) <= MOST_STEPS + 1
    assert overlap(search.best) == search.best_score > before + 0.2


def test_bayesian_steps_choose_better_than_random_ones():
    search = SwiftSearch(12, 0.45)
    kinds: tuple[list[float], list[float]] = [], []
    for step in range(1, 301):
        candidate = search.candidate()
        kinds[step % BAYESIAN_EVERY == 0].append(overlap(candidate))
        search.tell(candidate, overlap(candidate))
    random, bayesian = (sum(kind) / len(kind) for kind in kinds)
    assert len(kinds[1]) == 300 // BAYESIAN_EVERY
    assert bayesian > random + 0.1


def test_it_ends_when_it_is_good_enough_or_stale_or_has_been_long():
    good = SwiftSearch(12, 0.45)
    assert steps(good, lambda skipped: GOOD_ENOUGH + 0.01) == 1
    assert steps(SwiftSearch(12, 0.45), lambda skipped: 0.5) == 2 + PATIENCE
    rising = iter(range(MOST_STEPS + 2))
    assert steps(SwiftSearch(12, 0.45), lambda skipped: next(rising) / 1e6) == MOST_STEPS + 1


def test_the_same_seed_tries_the_same():
    one, two = SwiftSearch(12, 0.45, seed=3), SwiftSearch(12, 0.45, seed=3)
    for search in (one, two):
        for _ in range(BAYESIAN_EVERY + 1):
            search.tell(candidate := search.candidate(), overlap(candidate))
    assert [*one.scores] == [*two.scores]


@pytest.mark.parametrize(("num_layers", "ratio"), [(2, 0.45), (3, 0.1), (12, 0.0)])
def test_a_ratio_that_skips_nothing_is_refused(num_layers, ratio):
    with pytest.raises(ValueError, match=f"skip_ratio={ratio:g} skips 0 of"):
        SwiftSearch(num_layers, ratio)
