"""The command clasp-vllm: look at and check configurations, and measure."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from clasp_vllm import __version__
from clasp_vllm.bench import costs, inspection, profile, serving
from clasp_vllm.calibration import calibrate, fixed_mask
from clasp_vllm.config import ConfigError, LayerSkipConfig, parse_config, read_settings
from clasp_vllm.tools import assistant
from clasp_vllm.tools.options import split_arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="clasp-vllm", description="Self-speculative decoding for vLLM by layer skipping."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    commands.add_parser("keys", help="describe every key of the speculative configuration (Markdown)")
    check = commands.add_parser("check", help="check a configuration without starting vLLM")
    check.add_argument("config", help="path of a YAML or JSON file, or a JSON object")
    check.add_argument("--num-layers", type=int, help="also check it for a model with that many layers")
    serving.add_arguments(
        commands.add_parser("bench", help="speculative methods against plain vLLM, served and alternating")
    )
    profile.add_arguments(
        commands.add_parser("profile", help="where the time goes: verify, draft, optimise and the rest")
    )
    costs.add_arguments(
        commands.add_parser("costs", help="what the parts of a round cost, and what acceptance pays for them")
    )
    fixed_mask.add_arguments(
        commands.add_parser("search", help="the best fixed set of layers to skip, found by trying")
    )
    calibrate.add_arguments(
        commands.add_parser("calibrate", help="anchors and skip sets for method knn_ssd, found by trying")
    )
    inspection.add_arguments(
        commands.add_parser("inspect", help="a picture of the layers that requests skip over time")
    )
    assistant.add_arguments(
        commands.add_parser(
            "model", help="fetch SmolLM2-135M-Instruct, a small real model, and print its folder"
        )
    )
    wide = commands.add_parser("widen", help="a checkpoint made as costly as a larger one, same function")
    wide.add_argument("model", type=Path, help="folder of a checkpoint of the Llama family")
    wide.add_argument("output", type=Path, help="folder to write")
    wide.add_argument("--factor", type=int, default=8, help="times as wide (default %(default)s)")

    own_arguments, server_arguments = split_arguments(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(own_arguments, argparse.Namespace(server_arguments=server_arguments))
    if args.server_arguments and args.command not in ("bench", "calibrate", "costs", "inspect", "profile"):
        parser.error(f"{args.command} takes nothing after --")
    if args.command == "keys":
        print(key_table())
        return 0
    if args.command == "bench":
        return serving.main(args)
    if args.command == "profile":
        return profile.main(args)
    if args.command == "costs":
        return costs.main(args)
    if args.command == "search":
        return fixed_mask.main(args)
    if args.command == "calibrate":
        return calibrate.main(args)
    if args.command == "inspect":
        return inspection.main(args)
    if args.command == "model":
        return assistant.main(args)
    if args.command == "widen":
        return _widen(args)
    try:
        config = parse_config(read_settings(args.config))
        print(*config.explain(args.num_layers), sep="\n")
    except ConfigError as error:
        print(f"clasp-vllm: error: {error}", file=sys.stderr)
        return 2
    return 0


def _widen(args: argparse.Namespace) -> int:
    from clasp_vllm.bench.widen import WidenError, widen  # imports torch

    try:
        widen(args.model, args.output, args.factor)
    except WidenError as error:
        print(f"clasp-vllm: error: {error}", file=sys.stderr)
        return 2
    return 0


def key_table() -> str:
    """The configuration's keys as a Markdown table."""
    rows = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
    for name, field in LayerSkipConfig.model_fields.items():
        default = "required" if field.is_required() else _show(field.default)
        rows.append(f"| `{name}` | {default} | {_allowed(name, field)} | {field.description} |")
    return "\n".join(rows)


def _show(value: object) -> str:
    return "" if value is None else f"`{value}`"


def _allowed(name: str, field: FieldInfo) -> str:
    schema = LayerSkipConfig.model_json_schema()["properties"][name]
    options = [_option(option) for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
    return ", or ".join(options)


def _option(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "minimum" in schema:
        low = schema["minimum"]
        if "exclusiveMaximum" in schema:
            return f"{low:g} to below {schema['exclusiveMaximum']:g}"
        return f"{low} to {schema['maximum']}" if "maximum" in schema else f"from {low} on"
    return {"boolean": "`true` or `false`", "array": "a list", "string": "a path"}[schema["type"]]


if __name__ == "__main__":
    sys.exit(main())
