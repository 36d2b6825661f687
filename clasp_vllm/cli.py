"""The command clasp-vllm: look at and check configurations, and measure."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from pydantic.fields import FieldInfo

from clasp_vllm import __version__
from clasp_vllm.config import ConfigError, LayerSkipConfig, explain, parse_config, read_settings
from clasp_vllm.tools.options import split_arguments

# Each a module with `add_arguments` and `main`, imported when its command is asked for: `keys` and `check`
# need neither vLLM nor torch.
TOOLS = {
    "bench": ("bench.serving", "speculative methods against plain vLLM, served and alternating"),
    "profile": ("bench.profile", "where the time goes: verify, draft, optimise and the rest"),
    "costs": ("bench.costs", "what the parts of a round cost, and what acceptance pays for them"),
    "tune": ("bench.tuning", "what the controller would choose here at each load; writes a configuration"),
    "search": ("calibration.fixed_mask", "the best fixed set of layers to skip, found by trying"),
    "calibrate": ("calibration.calibrate", "anchors and skip sets for method knn_ssd, found by trying"),
    "inspect": (
        "bench.inspection",
        "a picture of the layers that requests skip, or what a server drafts now",
    ),
    "model": ("tools.assistant", "fetch SmolLM2-135M-Instruct, a small real model, and print its folder"),
    "widen": ("bench.widen", "a checkpoint made as costly as a larger one, same function"),
}
TAKES_SERVER_ARGUMENTS = ("bench", "calibrate", "costs", "inspect", "profile", "tune")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    own_arguments, server_arguments = split_arguments(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="clasp-vllm", description="Self-speculative decoding for vLLM by layer skipping."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    keys = commands.add_parser("keys", help="describe every key of the speculative configuration (Markdown)")
    keys.set_defaults(run=_keys)
    check = commands.add_parser("check", help="check a configuration without starting vLLM")
    check.add_argument("config", help="path of a YAML or JSON file, or a JSON object")
    check.add_argument("--num-layers", type=int, help="also check it for a model with that many layers")
    check.set_defaults(run=_check)
    for name, (module, description) in TOOLS.items():
        command = commands.add_parser(name, help=description)
        if name in own_arguments[:1]:
            tool = import_module(f"clasp_vllm.{module}")
            tool.add_arguments(command)
            command.set_defaults(run=tool.main)
    args = parser.parse_args(own_arguments, argparse.Namespace(server_arguments=server_arguments))
    if args.server_arguments and args.command not in TAKES_SERVER_ARGUMENTS:
        parser.error(f"{args.command} takes nothing after --")
    status: int = args.run(args)
    return status


def _keys(args: argparse.Namespace) -> int:
    print(key_table())
    return 0


def _check(args: argparse.Namespace) -> int:
    try:
        config = parse_config(read_settings(args.config))
        print(*explain(config, args.num_layers), sep="\n")
    except ConfigError as error:
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
    return "not set" if value is None else f"`{value}`"


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
