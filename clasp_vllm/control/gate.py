"""Whether to speculate at all.

| state         | what is done                  | left for                                                   |
|---------------|-------------------------------|------------------------------------------------------------|
| `SPECULATING` | rounds with drafts            | `TRYING` or `OFF`, as the best choice promises             |
| `TRYING`      | the same; only the optimistic | `SPECULATING` or `OFF`, as what is accepted tells          |
|               | estimate says that they pay   |                                                            |
| `PROBING`     | one round, once there is room | `OFF` after it, or after `PATIENCE` steps without room     |
| `OFF`         | plain steps                   | `SPECULATING` or `TRYING` if a new decision says so, due   |
|               |                               | every `OFF_CHECK` steps and when the batch changes;        |
|               |                               | `PROBING` when the time that it may lose has built up      |

No round is begun that could lose more than the loss budget holds: it then is `OFF`.
"""

from __future__ import annotations

from enum import Enum, auto

from clasp_vllm.control.loss_budget import LossBudget
from clasp_vllm.control.planner import WORTH_IT, Choice

PROBE_SHARE = 0.002  # of the time, what probes may lose while speculation is off
PATIENCE = 6  # steps that a probe waits for room
OFF_CHECK = 128  # steps without speculation until the next decision,
OFF_CHANGE = 0.25  # unless the number of rows has changed by this share, or as many are new
MATCH_PROBE = 32  # rounds with prompt-lookup matches that do not seem to pay, of which one takes them


class State(Enum):
    """Of a gate."""

    OFF = auto()
    PROBING = auto()
    TRYING = auto()
    SPECULATING = auto()


class Probes:
    """When to speculate although it does not seem to pay, so as to notice when it does."""

    def __init__(self) -> None:
        self._saved = 0.0  # seconds that may be lost

    def due(self, choice: Choice, plain_seconds: float, steps: int = 1) -> bool:
        """Count steps of ``plain_seconds`` each; whether to speculate as ``choice`` says all the same.

        Should none of its drafts be accepted, all probes together lose ``PROBE_SHARE`` of the time.
        """
        self._saved += PROBE_SHARE * plain_seconds * steps
        loss = choice.seconds - plain_seconds
        if self._saved < loss:
            return False
        self._saved -= loss
        return True


class Gate:
    """The state, and how long speculation has been off.

    Attributes:
        state: see ``State``.
        budget, match_budget: what drafting by skipping, and prompt lookup, may still lose.
        asks: whether the next round should have room for drafts.
    """

    def __init__(self, always_on: bool, shared: bool = False) -> None:
        """
        Args:
            always_on: whether to speculate whatever it costs.
            shared: whether several ranks must decide alike.
        """
        self.state = State.OFF
        self.budget, self.match_budget = LossBudget(shared), LossBudget(shared)
        self.probes = Probes()
        self.asks = False
        self._always_on = always_on
        self._rows = 0  # of the last decision
        self._waited = 0  # steps that a probe has waited for room
        self._left_out = 0  # rounds whose matches did not seem to pay, since some were taken
        self._off_steps, self._off_rows, self._off_started = 0, 0, 0
        self._idle = 0  # plain steps that need no decision yet
        self._idled = 0  # those that had none, since the last decision

    def due(self, rows: int, started: int) -> bool:
        """Whether a new decision is due: always while speculating, now and then while off.

        Args:
            rows: of the batch.
            started: sequences, since the last reset.
        """
        self._idle = 0
        similar = self._off_rows * (1 - OFF_CHANGE) <= rows <= self._off_rows * (1 + OFF_CHANGE)
        similar &= started - self._off_started <= rows * OFF_CHANGE
        if self._off_steps % OFF_CHECK and similar:
            return False
        self._off_rows, self._off_started = rows, started
        return True

    def decide(self, choice: Choice, optimistic: bool, plain_seconds: float, rows: int) -> None:
        """Go to the state that the best choice asks for.

        Args:
            optimistic: whether optimism alone makes it worth trying.
            plain_seconds: of a plain step of the batch.
            rows: of the batch.
        """
        self._rows = rows
        self._step()
        worth_it = choice.ratio >= WORTH_IT or optimistic
        self.asks = self._always_on or (worth_it and self.affords(choice, plain_seconds, rows))
        if self.asks:
            self.state = State.TRYING if optimistic else State.SPECULATING
        elif self.state is State.PROBING:
            self._waited += 1
            self.state = State.OFF if self._waited == PATIENCE else State.PROBING
        elif self.probes.due(choice, plain_seconds, 1 + self._idled):
            self.state, self._waited, self.asks = State.PROBING, 1, True
        else:
            self.state = State.OFF

    def affords(self, choice: Choice, plain_seconds: float, rows: int) -> bool:
        """Whether a round that gains nothing loses no more than the budget holds."""
        budget = self.budget if choice.length else self.match_budget
        return budget.affords(rows, choice.seconds, plain_seconds)

    def takes_matches(self, matches: Choice, plain_seconds: float, rows: int) -> bool:
        """Whether to take prompt-lookup matches by themselves: where they pay, and now and then where not.

        ``matches``: the best number of their tokens. Without a probe a wrong estimate of what verification
        costs would never be seen to be wrong.
        """
        if not self.affords(matches, plain_seconds, rows):
            return False
        self._left_out += 1
        if matches.ratio < WORTH_IT and self._left_out < MATCH_PROBE:
            return False
        self._left_out = 0
        return True

    def use_up(self) -> None:
        """Leave nothing to lose: some hundred steps go without drafts."""
        self.budget.use_up()
        self.match_budget.use_up()

    def _step(self) -> None:
        """Count an engine step."""
        self.budget.step(self._rows)
        self.match_budget.step(self._rows)

    @property
    def speculating(self) -> bool:
        """Whether rounds with drafts are the rule."""
        return self.state in (State.SPECULATING, State.TRYING)

    def opens(self, allowed: int) -> bool:
        """Count a round that has room for ``allowed`` draft tokens; whether to draft in it."""
        if allowed and self.state is not State.OFF:
            self._off_rows = self._off_steps = 0
            if self.state is State.PROBING:
                self.state = State.OFF
            return True
        self._off_steps += 1
        if not self.asks:
            self._idle = -self._off_steps % OFF_CHECK
        return False

    @property
    def may_idle(self) -> bool:
        """Whether a plain step of the same batch needs no decision."""
        return self._idle > 0

    def idle(self) -> None:
        """Count a plain step without a decision."""
        self._idle -= 1
        self._idled += 1
        self._off_steps += 1
        self._step()

    def take_idled(self) -> int:
        """Steps without a decision since the last call."""
        idled, self._idled = self._idled, 0
        return idled
