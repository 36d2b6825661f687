"""Results, written as soon as they are there."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class Report:
    """What was found so far, in ``results.json`` of a folder, and lines on the screen.

    Attributes:
        failed: the names of results that are errors.
    """

    def __init__(self, folder: Path, about: dict[str, str]) -> None:
        self.failed: list[str] = []
        self._path = folder / "results.json"
        self._results: dict[str, Any] = {"about": about}
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line with the seconds since the start."""
        print(f"[{time.monotonic() - self._began:5.0f} s] {text}", flush=True)

    def keep(self, part: str, name: str, result: Any) -> Any:
        """Write a result, and return it. One with the key "error" is a failure."""
        self._results.setdefault(part, {})[name] = result
        self._path.write_text(json.dumps(self._results, indent=1) + "\n")
        if isinstance(result, dict) and "error" in result:
            self.failed.append(name)
            self.say(f"{part} {name}: FAILED\n{result['error'][-1500:]}")
        return result
