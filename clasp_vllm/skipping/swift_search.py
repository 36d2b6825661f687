"""SWIFT's search: which sub-layers to skip, tried one set at a time while tokens are generated.

SWIFT (arXiv 2410.06916, section 4) draws a random set in every step and now and then one by Bayesian
optimisation, keeps the best, and stops for good after so many steps, or so many without a better one, or
when the best is good enough. The numbers are the defaults of its published code (hemingkx/SWIFT, commit
0501393).

Not as there: the set in use at the beginning, every second layer, is cut to the ratio, scored first and so
kept until one is better (there the first random set replaces it); sets are scored on the tokens generated
last (there on a request's first); the Gaussian process chooses among random sets (there its point is
continuous, and its greatest coordinates count).
"""

from __future__ import annotations

import math

import numpy as np

SkipSet = frozenset[int]

WINDOW = 32  # tokens that a set is tried on
BAYESIAN_EVERY = 25  # steps
MOST_STEPS = 1000
PATIENCE = 300  # steps without a better set
GOOD_ENOUGH = 0.95  # of the window's tokens
KAPPA = 2.5  # deviations that the upper confidence bound lies above the mean
NOISE = 1e-2  # variance of a score, of the variance of all


class SwiftSearch:
    """Sub-layers are numbered ``2 i`` (attention of layer ``i``) and ``2 i + 1`` (its MLP).

    Those of the first and the last layer are never skipped.
    """

    def __init__(self, num_layers: int, skip_ratio: float, seed: int = 0) -> None:
        """``skip_ratio``: of the sub-layers between the first and the last layer, rounded down.

        Raises:
            ValueError: nothing would be skipped, or nothing is left to choose.
        """
        self._items = np.arange(2, 2 * (num_layers - 1))
        self._size = int(len(self._items) * skip_ratio)
        if not 0 < self._size < len(self._items):
            raise ValueError(
                f"skip_ratio={skip_ratio:g} skips {self._size} of the {max(len(self._items), 0)} sub-layers "
                "between the first and the last layer; allowed is more than none and less than all"
            )
        self._random = np.random.default_rng(seed)
        every_second = [
            2 * layer + part for i in (1, 2) for layer in range(i, num_layers - 1, 2) for part in (0, 1)
        ]
        self.best: SkipSet = frozenset(every_second[: self._size])
        self.best_score = -math.inf
        self.scores: dict[SkipSet, float] = {}  # the last score of each set tried
        self.steps = 0
        self._better_at = 0

    @property
    def ended(self) -> bool:
        """Whether the search is over."""
        stale = self.steps - self._better_at > PATIENCE
        return self.steps > MOST_STEPS or stale or self.best_score > GOOD_ENOUGH

    def candidate(self) -> SkipSet:
        """The set to try in this step."""
        if not self.scores:
            return self.best
        if (self.steps + 1) % BAYESIAN_EVERY == 0:
            return self._promising()
        return self._random_set()

    def tell(self, candidate: SkipSet, score: float) -> bool:
        """How many of the window's tokens the set predicted, as a share. Whether it is the best so far."""
        self.steps += 1
        self.scores[candidate] = score
        if score <= self.best_score:
            return False
        self.best, self.best_score, self._better_at = candidate, score, self.steps
        return True

    def _random_set(self) -> SkipSet:
        return frozenset(self._random.choice(self._items, self._size, replace=False).tolist())

    def _promising(self, pool: int = 200) -> SkipSet:
        """Of some random sets that of the greatest upper confidence bound."""
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import Matern

        kernel = Matern(math.sqrt(len(self._items)), nu=2.5)
        process = GaussianProcessRegressor(kernel, alpha=NOISE, optimizer=None, normalize_y=True)
        process.fit(self._vectors([*self.scores]), [*self.scores.values()])
        candidates = [self._random_set() for _ in range(pool)]
        mean, deviation = process.predict(self._vectors(candidates), return_std=True)
        return candidates[int(np.argmax(mean + KAPPA * deviation))]

    def _vectors(self, sets: list[SkipSet]) -> np.ndarray:
        """[sets, sub-layers that may be skipped] 0 and 1."""
        return np.array([np.isin(self._items, list(skipped)) for skipped in sets], dtype=np.float64)
