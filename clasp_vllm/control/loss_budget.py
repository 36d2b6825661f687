"""What speculation may lose against plain decoding, so that a wrong estimate cannot cost much.

Estimates say whether drafting pays, and they can be wrong: of requests not met before, of a model whose
drafts never quite pay, of a machine that has become slower. So what speculation really gained or lost is kept
like an account, in plain steps: every engine step adds a little, every round adds what it gained, and the
controller begins no round that could lose more than is there.

Drafting by skipping and prompt lookup have an account each: what lookups gain on a text that repeats itself
is no reason to try again and again what has not paid.

A step that a batch loses, each of its sequences loses. It counts for each of them, or the first answers of a
large batch, which take few steps, would lose the most; but not for more than a few, for one round must be
possible in every batch.
"""

from __future__ import annotations

START = 12.0  # plain steps that may be lost before anything is known
SHARE = 0.002  # of all steps, what may be lost in the long run
MOST = 24.0  # plain steps of gains that are remembered: what was earned on one text is not lost on another
# No round is begun with less than it could lose, so more is lost only where the machine stops for a while or
# an estimate is wrong. That is not held against speculation for longer than the share takes to pay one step.
LEAST = -1.0
COUNTED = 8  # sequences of a batch, at most, that a step counts for


class LossBudget:
    """An account of one engine.

    Attributes:
        balance: plain steps of one sequence that speculation may still lose.
        shared: rank 0's balance, where ranks must decide alike; else None.
    """

    def __init__(self, shared: bool = False) -> None:
        """``shared``: whether several ranks must decide alike."""
        self.balance = START
        self.shared: float | None = START if shared else None

    def affords(self, rows: int, seconds: float, plain_seconds: float) -> bool:
        """Whether a round of ``rows`` sequences that gains nothing loses no more than there is."""
        balance = self.balance if self.shared is None else self.shared
        return balance >= counted(rows) * (seconds / plain_seconds - 1)

    def step(self, rows: int) -> None:
        """Count an engine step of ``rows`` sequences."""
        self._add(rows, SHARE)

    def charge_drafting(self, rows: int, seconds: float, plain_seconds: float) -> None:
        """Drafting took so long. ``plain_seconds``: of a plain step of the same rows."""
        self._add(rows, -seconds / plain_seconds)

    def verified(self, rows: int, tokens: int, seconds: float, plain_seconds: float) -> None:
        """A step that verified drafts of ``rows`` sequences made ``tokens`` tokens in ``seconds``."""
        self._add(rows, tokens / rows - seconds / plain_seconds)

    def use_up(self) -> None:
        """Leave nothing to lose."""
        self.balance = min(self.balance, 0.0)

    def _add(self, rows: int, steps: float) -> None:
        self.balance = min(max(self.balance + counted(rows) * steps, LEAST), MOST)


def counted(rows: int) -> int:
    """How many plain steps of one sequence a step of ``rows`` sequences counts as."""
    return min(rows, COUNTED)
