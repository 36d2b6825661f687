"""Find the best set of layers to skip, by trying: a score to maximise and a number of trials.

Two searches that know nothing of models. ``bayesian`` is Self-SD's (arXiv 2309.08168, section 4.1): a
Gaussian process over 0/1 vectors and the expected improvement. ``swaps`` climbs: it trades one skipped
layer for a kept one, or where the size is free skips or keeps one more, and stays where that was better.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

SkipSet = frozenset[int]
Score = Callable[[SkipSet], float]


@dataclass
class Trials:
    """What has been tried, in order, each set once.

    Attributes:
        score: what to maximise.
        limit: trials allowed.
        scores: of the sets tried, in order.
        on_trial: called after each.
    """

    score: Score
    limit: int
    on_trial: Callable[[], None] = lambda: None
    scores: dict[SkipSet, float] = field(default_factory=dict)

    def __call__(self, skipped: SkipSet) -> float:
        """The score of a set; counts as a trial if it is new."""
        if skipped not in self.scores:
            if self.left == 0:
                raise ValueError(f"no more than {self.limit} trials")
            self.scores[skipped] = self.score(skipped)
            self.on_trial()
        return self.scores[skipped]

    @property
    def left(self) -> int:
        """Trials left."""
        return self.limit - len(self.scores)

    @property
    def best(self) -> SkipSet:
        """The best set so far."""
        return max(self.scores, key=lambda skipped: self.scores[skipped])


def swaps(trials: Trials, num_layers: int, start: SkipSet, seed: int = 0, any_size: bool = False) -> SkipSet:
    """Climb from ``start`` by single changes in random order; from a random set again when on top."""
    random = np.random.default_rng(seed)
    current = start
    while trials.left:
        value = trials(current)
        neighbours = _neighbours(current, num_layers, any_size)
        random.shuffle(neighbours)
        for candidate in neighbours:
            if candidate in trials.scores:
                continue
            if not trials.left or trials(candidate) > value:
                current = candidate
                break
        else:
            current = _random_set(random, num_layers, len(start), any_size)
            if len(trials.scores) >= _how_many(num_layers, len(start), any_size):
                break
    return trials.best


def bayesian(
    trials: Trials,
    num_layers: int,
    start: SkipSet,
    seed: int = 0,
    any_size: bool = False,
    first: int = 20,
) -> SkipSet:
    """Bayesian optimisation, after ``start`` and ``first`` random sets."""
    from scipy.stats import norm
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    random = np.random.default_rng(seed)
    trials(start)
    everything = _how_many(num_layers, len(start), any_size)
    while trials.left and len(trials.scores) < min(first, everything):
        trials(_random_set(random, num_layers, len(start), any_size))
    kernel = ConstantKernel(1.0) * RBF(np.sqrt(num_layers)) + WhiteKernel(1e-3)
    process = GaussianProcessRegressor(kernel, normalize_y=True)
    while trials.left and len(trials.scores) < everything:
        # The kernel's own parameters change slowly: fit them now and then.
        process.optimizer = "fmin_l_bfgs_b" if len(trials.scores) % 20 == 0 else None
        known = list(trials.scores)
        process.fit(_vectors(known, num_layers), list(trials.scores.values()))
        process.kernel = process.kernel_
        pool = {_random_set(random, num_layers, len(start), any_size) for _ in range(400)}
        pool |= set(_neighbours(trials.best, num_layers, any_size))
        candidates = sorted(pool - trials.scores.keys(), key=sorted)
        if not candidates:
            continue
        mean, deviation = process.predict(_vectors(candidates, num_layers), return_std=True)
        gain = mean - trials.scores[trials.best]
        z = gain / np.maximum(deviation, 1e-9)
        trials(candidates[int(np.argmax(gain * norm.cdf(z) + deviation * norm.pdf(z)))])
    return trials.best


# search(trials, number of layers, start, seed, whether sets of other sizes are tried too)
SEARCHES: dict[str, Callable[[Trials, int, SkipSet, int, bool], SkipSet]] = {
    "bayesian": bayesian,
    "swaps": swaps,
}


def _neighbours(skipped: SkipSet, num_layers: int, any_size: bool) -> list[SkipSet]:
    kept = [layer for layer in range(num_layers) if layer not in skipped]
    neighbours = [skipped - {out} | {into} for out in sorted(skipped) for into in kept]
    if any_size:
        neighbours += [skipped ^ {layer} for layer in range(num_layers) if skipped != {layer}]
    return neighbours


def _random_set(random: np.random.Generator, num_layers: int, size: int, any_size: bool) -> SkipSet:
    if any_size:
        size = int(random.integers(1, min(2 * size, num_layers)))
    return frozenset(random.choice(num_layers, size, replace=False).tolist())


def _how_many(num_layers: int, size: int, any_size: bool) -> int:
    """Sets there are to try."""
    if not any_size:
        return math.comb(num_layers, size)
    return sum(math.comb(num_layers, count) for count in range(1, min(2 * size, num_layers)))


def _vectors(sets: list[SkipSet], num_layers: int) -> np.ndarray:
    vectors = np.zeros((len(sets), num_layers))
    for row, skipped in enumerate(sets):
        vectors[row, sorted(skipped)] = 1.0
    return vectors
