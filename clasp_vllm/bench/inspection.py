"""Which layers each request skips over time: a picture of layers by rounds, and the same as text.

Of a running server what its metrics say: see ``bench.live``.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from clasp_vllm.config import ConfigError, read_settings
from clasp_vllm.drafting.batch import SequenceBatch
from clasp_vllm.drafting.draft import DraftRound
from clasp_vllm.drafting.observer import RoundObserver
from clasp_vllm.tools import engine
from clasp_vllm.tools.options import engine_settings, number
from clasp_vllm.tools.prompts import TASKS, task_prompts

# What a round did with a layer, as a letter of the text and a colour of the picture.
KINDS = (
    ("nothing was drafted by skipping", " ", "#ffffff"),
    ("run", "█", "#1f3b5c"),
    ("attention skipped", "▄", "#7a9cc6"),
    ("MLP skipped", "▀", "#b8862b"),
    ("skipped", "·", "#e8e4da"),
)


def kinds(masks: list[np.ndarray | None], num_layers: int) -> np.ndarray:
    """[num_layers, rounds] int, indices into ``KINDS``.

    Args:
        masks: by round, [num_layers, 2] bool, True = skipped; None where nothing was drafted by skipping.
    """
    columns = [np.zeros(num_layers, dtype=int) if m is None else 1 + m[:, 0] + 2 * m[:, 1] for m in masks]
    return np.array(columns, dtype=int).reshape(-1, num_layers).T


def as_text(layer_kinds: np.ndarray) -> str:
    """A line for each layer, a letter for each round."""
    letters = np.array([letter for _, letter, _ in KINDS])
    return "\n".join(f"{layer:3d} {''.join(letters[row])}" for layer, row in enumerate(layer_kinds))


def legend(layer_kinds: np.ndarray) -> str:
    """The letters that occur."""
    return ", ".join(f"{letter!r} {name}" for i, (name, letter, _) in enumerate(KINDS) if i in layer_kinds)


def draw(requests: dict[str, np.ndarray], path: Path) -> None:
    """A panel for each request: its name and [num_layers, rounds] ``kinds``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    widest = max(layer_kinds.shape[1] for layer_kinds in requests.values())
    size = (min(3 + 0.12 * widest, 14), 0.8 + 2.4 * len(requests))
    figure, axes = pyplot.subplots(len(requests), 1, figsize=size, sharex=True, squeeze=False)
    colours = ListedColormap([colour for *_, colour in KINDS])
    for axis, (name, layer_kinds) in zip(axes[:, 0], requests.items(), strict=True):
        axis.imshow(
            layer_kinds, cmap=colours, vmin=0, vmax=len(KINDS) - 1, aspect="auto", interpolation="nearest"
        )
        axis.set_ylabel("layer")
        axis.set_title(name, loc="left", fontsize="small")
    axes[-1, 0].set_xlabel("round")
    present = np.unique(np.concatenate([layer_kinds.ravel() for layer_kinds in requests.values()]))
    handles = [Patch(facecolor=KINDS[i][2], edgecolor="#888888", label=KINDS[i][0]) for i in present]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), fontsize="small", frameon=False)
    figure.tight_layout(rect=(0, 0.35 / size[1], 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


class MaskRecorder(RoundObserver):
    """Keeps what each request skipped.

    Attributes:
        masks: by request and round, [num_layers, 2] bool, True = skipped; None where nothing was drafted by
            skipping.
    """

    def __init__(self) -> None:
        self.masks: dict[str, list[np.ndarray | None]] = defaultdict(list)

    def round_ended(self, batch: SequenceBatch, drafted: DraftRound | None) -> None:
        """See ``RoundObserver``."""
        masks: list[np.ndarray | None] = [None] * len(batch)
        if drafted is not None and drafted.skip_drafts is not None:
            for row, mask in zip(drafted.skipping, drafted.skip_drafts.masks.numpy(), strict=True):
                masks[row] = mask
        for request_id, mask in zip(batch.request_ids, masks, strict=True):
            self.masks[request_id].append(mask)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("model", help="name or path; or http://HOST:PORT, a running server to look at")
    parser.add_argument(
        "--seconds", type=number(1), default=10, help="to look at a server for (default %(default)s)"
    )
    parser.add_argument(
        "--speculative-config", default='{"method": "clasp"}', help="as for vllm serve (default %(default)s)"
    )
    parser.add_argument(
        "--prompt", action="append", help="may be given several times (default: one of each task)"
    )
    parser.add_argument("--max-tokens", type=number(1), default=64, help="tokens per answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="default %(default)s")
    parser.add_argument("--output", type=Path, default=Path("layers.png"), help="default %(default)s")
    parser.epilog = "Arguments after -- are those of vllm serve."


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.model.startswith(("http://", "https://")):
        return _inspect_server(args)
    engine.stay_in_process()
    from importlib.util import find_spec

    from rich.console import Console

    console = Console(soft_wrap=True)
    if find_spec("matplotlib") is None:
        Console(stderr=True).print(
            'clasp-vllm: error: inspect draws with matplotlib: pip install ".[bench]"', markup=False
        )
        return 2
    try:
        config = read_settings(args.speculative_config)
    except ConfigError as error:
        Console(stderr=True).print(f"clasp-vllm: error: {error}", markup=False)
        return 2
    prompts = args.prompt or [task_prompts(task)[0] for task in TASKS]
    from vllm import LLM, SamplingParams

    settings = {"max_num_seqs": len(prompts)} | engine_settings(args.model, args.server_arguments)
    llm = LLM(args.model, speculative_config=config, **settings)
    drafter = engine.drafter(llm)
    if drafter is None:
        raise SystemExit(f"clasp-vllm: error: nothing skips layers with {args.speculative_config}")
    recorder = drafter.observer = MaskRecorder()
    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
    answers = llm.generate(prompts, params)
    num_layers, pictures = drafter.decoder.num_layers, {}
    for i, answer in enumerate(answers, start=1):
        # The engine's names of requests begin with ours.
        masks = next((m for name, m in recorder.masks.items() if name.split("-")[0] == answer.request_id), [])
        name = f"{i}. {' '.join(answer.prompt.split())[:70]}"
        pictures[name] = kinds(masks, num_layers)
        tokens = len(answer.outputs[0].token_ids)
        console.print(f"\n{name}\n{tokens} tokens in {len(masks)} rounds", markup=False, highlight=False)
        console.print(as_text(pictures[name]), markup=False, highlight=False)
        console.print(legend(pictures[name]), markup=False, highlight=False)
    draw(pictures, args.output)
    console.print(f"\nwritten: {args.output}", markup=False)
    return 0


def _inspect_server(args: argparse.Namespace) -> int:
    from clasp_vllm.bench.live import watch

    try:
        if args.prompt or args.server_arguments:
            raise ValueError(
                "a running server is only looked at: --prompt and arguments after -- are not used"
            )
        print(watch(args.model, args.seconds))
    except ValueError as error:
        print(f"clasp-vllm: error: {error}", file=sys.stderr)
        return 2
    return 0
