"""Reads a speculative configuration, and says what is wrong with it."""

from __future__ import annotations

import difflib
import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from clasp_vllm.config.schema import (
    CHOICES,
    METHODS,
    REMOVED_KEYS,
    REMOVED_METHODS,
    VLLM_KEYS,
    ConfigError,
    LayerSkipConfig,
)

LARGEST = 1 << 16  # bytes of a file: reading so much YAML takes seconds, and more of it minutes

_SHORT = reprlib.Repr()  # values in messages are cut
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 3, 8, 8, 200, 200


def short_repr(value: object) -> str:
    """A value of whatever size and nesting, for a message."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        return "a number of too many digits"


class _Loader(yaml.SafeLoader):
    """YAML without aliases: by these a few lines can stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node."""
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem=f"the alias *{alias.anchor} is not allowed: write the value out",
                problem_mark=alias.start_mark,
            )
        return super().compose_node(parent, index)


def is_ours(settings: object) -> bool:
    """Whether a speculative configuration asks for one of our methods, or uses keys only we have."""
    if not isinstance(settings, Mapping):
        return False
    own_keys = {*LayerSkipConfig.model_fields, *REMOVED_KEYS} - {"method", *VLLM_KEYS}
    return settings.get("method") in (*METHODS, *REMOVED_METHODS) or (
        settings.get("method") is None and not own_keys.isdisjoint(settings)
    )


def read_settings(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The key-value pairs of a configuration given as a mapping, as JSON or as a file's path.

    Raises:
        ConfigError: the file is missing, unreadable or too large, or it does not hold key-value pairs.
    """
    if isinstance(source, Mapping):
        return dict(source)
    text = str(source)
    if text.lstrip().startswith(("{", "[")):
        settings, origin = _parse(text, json.loads, "the JSON given"), "the JSON given"
    else:
        origin = f"file {short_repr(text)}"
        try:
            path = Path(text).expanduser()
            if not path.is_file():
                raise ConfigError(
                    f"speculative configuration {short_repr(text)}: no such file; "
                    "allowed is a JSON object or the path of a YAML or JSON file"
                )
            size = path.stat().st_size
            if size > LARGEST:
                raise ConfigError(
                    f"speculative configuration {origin}: has {size} bytes; allowed are {LARGEST} at most"
                )
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeError, RuntimeError) as error:  # the last: a home directory that is not known
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigError(f"speculative configuration {origin}: {reason}") from error
        settings = _parse(content, lambda text: yaml.load(text, _Loader), origin)
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ConfigError(
            f"speculative configuration {origin}: holds {_describe(settings)}; "
            "allowed are key-value pairs, such as `method: clasp`"
        )
    return settings


def _parse(text: str, load: Any, origin: str) -> object:
    try:
        return load(text)
    except Exception as error:  # PyYAML raises anything for a value that is not of its tag's kind
        raise ConfigError(
            f"speculative configuration {origin} cannot be read: {' '.join(str(error).split())}"
        ) from error


def _describe(value: object) -> str:
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "keys that are not text"
    return "nothing" if value is None else short_repr(value)


def parse_config(settings: Mapping[str, Any]) -> LayerSkipConfig:
    """Check the settings of one of our methods.

    Raises:
        ConfigError: names each key that is wrong, its value and what is allowed.
    """
    names = {key.replace("-", "_"): value for key, value in settings.items()}
    try:
        return LayerSkipConfig.model_validate(names)
    except ValidationError as error:
        problems = "; ".join(_explain(dict(e), names) for e in error.errors())
        raise ConfigError(f"speculative configuration: {problems}") from None


def _explain(error: dict[str, Any], settings: Mapping[str, Any]) -> str:
    if not error["loc"]:
        return str(error["msg"]).removeprefix("Value error, ")
    key = str(error["loc"][0])
    value = short_repr(settings.get(key))
    choices = settings.get(key) if key == "adaptive" else None
    if isinstance(choices, list) and "sharing" in choices:
        return (
            f"adaptive={value}: sharing was removed, for it gained nothing; allowed are {', '.join(CHOICES)}"
        )
    named = settings.get(key) if key == "method" else None
    why = REMOVED_METHODS.get(named) if isinstance(named, str) else None
    if why is not None:
        return f"method={value} was removed, for {why}; allowed are {', '.join(METHODS)}"
    if key in REMOVED_KEYS:
        return f"{key}={value} was removed: {REMOVED_KEYS[key]}"
    if error["type"] == "extra_forbidden":
        known = list(LayerSkipConfig.model_fields)
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"unknown key {key}={value}; {hint}allowed keys: {', '.join(known)}"
    return f"{key}={value}: {str(error['msg']).lower()}"
