"""Several runs of `clasp-vllm bench` as one, where one has neither the memory nor the time.

    .venv/bin/python scripts/bench/merge.py bench/first bench/second --output bench/both

Every ratio stays that of two neighbouring measurements of one run.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from clasp_vllm.bench.report import is_first, write_report


def merge(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Results of all runs. Repeats are counted on, facts that differ are named one after the other.

    Raises:
        ValueError: two runs mean different configurations by one name.
    """
    methods: dict[str, str] = {}
    measurements, repeats = [], 0
    for run in runs:
        for name, config in run["methods"].items():
            if methods.setdefault(name, config) != config:
                raise ValueError(f"{name}: {methods[name]} in one run and {config} in another")
        measurements += [
            row | {"repeat": row["repeat"] + repeats, "first_repeat": is_first(row)}
            for row in run["measurements"]
        ]
        repeats = max(row["repeat"] for row in measurements) + 1
    facts = {
        name: "; ".join(dict.fromkeys(str(run["about"].get(name)) for run in runs))
        for name in runs[0]["about"]
    }
    return {
        "about": facts,
        "methods": methods,
        "measurements": measurements,
        "profiles": [profile for run in runs for profile in run.get("profiles", [])],
        "costs": next((run["costs"] for run in runs if run.get("costs")), None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders with results.json")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results of all")
    args = parser.parse_args()
    try:
        merged = merge([json.loads((folder / "results.json").read_text()) for folder in args.runs])
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{error!r}")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps(merged, indent=1) + "\n")
    write_report(merged, args.output)


if __name__ == "__main__":
    main()
