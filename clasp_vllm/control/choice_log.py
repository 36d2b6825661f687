"""Says what the controller chooses, in words."""

from __future__ import annotations

from collections.abc import Callable

from clasp_vllm.control.costs import Array
from clasp_vllm.control.gate import State
from clasp_vllm.control.planner import Choice

WORDS = {
    State.OFF: "off",
    State.PROBING: "probing",
    State.TRYING: "trying",
    State.SPECULATING: "speculating",
}


class ChoiceLog:
    """Tells ``log`` of each choice that differs from the one before."""

    def __init__(self, log: Callable[[str], None], num_layers: int) -> None:
        self._log, self._num_layers = log, num_layers
        self._logged: tuple[object, ...] = ()

    def say(
        self,
        rows: int,
        choice: Choice,
        state: State,
        skipped: int,
        window: int | None,
        acceptance: Array,
        seconds: tuple[float, float],
    ) -> None:
        """A choice for so many sequences.

        Args:
            skipped: layers.
            window: tokens of context that drafts attend to; None: all.
            acceptance: [longest] of drafts by position, in the mean of the sequences.
            seconds: of a plain step and of a draft step.
        """
        made = rows, choice.budget, choice.length, choice.context, choice.ngram, state
        if made == self._logged:
            return
        self._logged = made
        plain, step = (1000 * of for of in seconds)
        self._log(
            f"{rows} sequences: {WORDS[state]}; "
            f"best: {choice.length} tokens with {skipped} of {self._num_layers} layers skipped, "
            f"{choice.ngram} by prompt lookup, "
            f"attending to {window or 'all'} tokens of context at most, "
            f"stopping when the chance of all falls under {choice.floor:.2f}, "
            f"expected {choice.ratio:.2f} times plain decoding (acceptance "
            f"{' '.join(f'{chance:.2f}' for chance in acceptance)}, "
            f"a plain step {plain:.1f} ms, a draft step {step:.1f} ms)"
        )
