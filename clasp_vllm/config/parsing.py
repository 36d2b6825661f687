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

LARGEST = 1 << 20  # bytes of a file

# Values in messages are cut: a few lines of YAML can stand for gigabytes.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 3, 8, 8, 200, 200


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
        path = Path(text).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"speculative configuration {text!r}: no such file; "
                "allowed is a JSON object or the path of a YAML or JSON file"
            )
        origin = f"file {text!r}"
        try:
            size = path.stat().st_size
            if size > LARGEST:
                raise ConfigError(
                    f"speculative configuration {origin}: has {size} bytes; allowed are {LARGEST} at most"
                )
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"speculative configuration {origin}: {error}") from error
        settings = _parse(content, yaml.safe_load, origin)
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ConfigError(
            f"speculative configuration {origin}: holds {_describe(settings)}; "
            "allowed are key-value pairs, such as `method: clasp`"
        )
    return settings


def _parse(text: str, load: Any, origin: str) -> object:
    try:
        return load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(
            f"speculative configuration {origin} cannot be read: {' '.join(str(error).split())}"
        ) from error


def _describe(value: object) -> str:
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "keys that are not text"
    return "nothing" if value is None else _SHORT.repr(value)


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
    value = _SHORT.repr(settings.get(key))
    choices = settings.get(key) if key == "adaptive" else None
    if isinstance(choices, list) and "sharing" in choices:
        return (
            f"adaptive={value}: sharing was removed, for it gained nothing; allowed are {', '.join(CHOICES)}"
        )
    why = REMOVED_METHODS.get(str(settings.get(key))) if key == "method" else None
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
