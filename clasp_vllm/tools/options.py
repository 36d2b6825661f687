"""Options that the measuring commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any


def number(least: int) -> Callable[[str], int]:
    """An argparse type: an integer from ``least`` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r}; allowed are integers from {least} on")
        return value

    return parse


def numbers(least: int) -> Callable[[str], list[int]]:
    """An argparse type: integers from ``least`` on, separated by commas."""
    return lambda text: [number(least)(part) for part in text.split(",")]


def loads(text: str) -> list[int | str]:
    """An argparse type: numbers of requests at once, separated by commas.

    One may also rise and fall while it is measured: 1-4-16-4-1.
    """
    requests_at_once: list[int | str] = []
    for part in text.split(","):
        levels = [number(1)(level) for level in part.split("-")]
        requests_at_once.append(levels[0] if len(levels) == 1 else part)
    return requests_at_once


def levels(load: int | str) -> list[int]:
    """The numbers of requests at once of a load, in turn."""
    return [int(level) for level in str(load).split("-")]


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line before and after ``--``: argparse gives positionals behind options to nobody."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    return list(arguments[:cut]), list(arguments[cut + 1 :])


def engine_settings(model: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Arguments of `vllm serve` as those of vllm.LLM: what differs from the defaults.

    Raises:
        SystemExit: an argument is unknown or wrong; the message says which.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    given, default = (
        vars(EngineArgs.from_cli_args(parser.parse_args(["--model", model, *command_line])))
        for command_line in (arguments, ())
    )
    settings = {name: value for name, value in given.items() if value != default[name]}
    if "speculative_config" in settings:
        raise SystemExit("clasp-vllm: error: --speculative-config goes before --, not behind it")
    return settings
