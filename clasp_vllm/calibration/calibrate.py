"""The command that calibrates for KNN-SSD: anchors for each task, and what each task skips.

Source: KNN-SSD (arXiv 2505.16162), section 3. Everything it finds goes to the output folder at once, so
that an interrupted calibration goes on where it stopped and ends with the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clasp_vllm.calibration.fingerprint import fingerprint
from clasp_vllm.calibration.search import SEARCHES, SkipSet, Trials
from clasp_vllm.tools.cost_model import expected_tokens
from clasp_vllm.tools.engine import stay_in_process
from clasp_vllm.tools.options import engine_settings, number
from clasp_vllm.tools.prompts import HELD_OUT, TASKS, read_prompts, task_prompts
from clasp_vllm.tools.provenance import about

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "weights", "weights to search with"  # fingerprints of the models, among the settings
EVERYTHING = "everything"  # the task of prompts that are of no task known: the best set for all together
OVERHEAD = 0.03  # of a draft step, in plain steps, besides its sub-layers
LONGEST = 8  # draft tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("model", help="name or path of a model of the Llama family")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; interrupted, it goes on")
    parser.add_argument(
        "--tasks",
        type=lambda text: text.split(","),
        default=list(TASKS),
        help='of the package\'s, or NAME=FILE with lines {"prompt": "..."} (default: '
        f"{','.join(TASKS)}, their held-out prompts)",
    )
    parser.add_argument(
        "--anchors", type=number(1), default=10, help="per task at most (default %(default)s)"
    )
    parser.add_argument(
        "--trials", type=number(1), default=200, help="sets to try per task (default %(default)s)"
    )
    parser.add_argument(
        "--search", choices=SEARCHES, default="swaps", help="how to search (default %(default)s)"
    )
    parser.add_argument(
        "--search-prompts",
        type=number(1),
        default=8,
        help="prompts of a task to search with (default %(default)s)",
    )
    parser.add_argument(
        "--search-model",
        help="a cheaper model of the same layers and the same function to search with, such as the one that "
        "`clasp-vllm widen` widened (default: the model itself)",
    )
    parser.add_argument("--max-tokens", type=number(2), default=64, help="tokens of each answer to score")
    parser.add_argument("--seed", type=int, default=0, help="of clustering and search (default %(default)s)")
    parser.epilog = "Arguments after -- are those of vllm serve, for the engine that embeds the prompts."


def tasks_of(args: argparse.Namespace) -> dict[str, list[str]]:
    """Prompts by task.

    Raises:
        ValueError: a task is unknown, or its file holds no prompts.
    """
    tasks: dict[str, list[str]] = {}
    for text in args.tasks:
        name, _, path = text.partition("=")
        if not re.fullmatch(r"[\w.-]+", name) or name in (*tasks, EVERYTHING):
            raise ValueError(
                f"--tasks {text}: allowed are names of letters, digits, '_', '.' and '-', each once, but "
                f"not {EVERYTHING}"
            )
        if path:
            tasks[name] = list(dict.fromkeys(read_prompts(Path(path), f"--tasks {text}")))
        elif name in TASKS:
            tasks[name] = task_prompts(name)[HELD_OUT:]
        else:
            raise ValueError(f"--tasks {text}: allowed are {', '.join(TASKS)} and NAME=FILE")
        if len(tasks[name]) < 2:
            raise ValueError(f"--tasks {text}: holds fewer than two different prompts")
    return tasks


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    stay_in_process()
    from rich.console import Console

    console = Console(stderr=True)
    try:
        if any(word.partition("=")[0] == "--revision" for word in args.server_arguments):
            raise ValueError("--revision: not allowed here; calibrate a folder with that revision's files")
        tasks = tasks_of(args)
        args.output.mkdir(parents=True, exist_ok=True)
        keep_settings(args, tasks)
    except (ValueError, OSError) as error:
        console.print(f"clasp-vllm: error: {error}", markup=False)
        return 2
    try:
        manifest = calibrate(args, tasks)
    except ValueError as error:
        console.print(f"clasp-vllm: error: {error}", markup=False)
        return 2
    (args.output / "about.json").write_text(json.dumps(about(args.model), indent=1) + "\n")
    apart = "one task" if manifest["silhouette"] is None else f"silhouette {manifest['silhouette']:.2f}"
    console.print(f"{args.output}: {apart}; anchors.png shows whether the tasks lie apart", markup=False)
    for task in manifest["tasks"]:
        skipped = len(task["skip_attention"]), len(task["skip_mlp"])
        console.print(
            f"{task['name']}: {skipped[0]} attentions and {skipped[1]} MLPs skipped, "
            f"acceptance {task['acceptance']:.3f}, promises {task['speedup']:.2f}",
            markup=False,
        )
    return 0


def keep_settings(args: argparse.Namespace, tasks: dict[str, list[str]]) -> None:
    """Write down what is to be done; refuse to go on with something else.

    Raises:
        ValueError: the folder holds a calibration with other settings.
    """
    settings = {name: str(value) for name, value in sorted(settings_of(args).items())}
    settings["arguments after --"] = " ".join(args.server_arguments)
    for name, model in zip(WEIGHTS, (args.model, args.search_model), strict=True):
        if model is not None:
            settings[name] = str(fingerprint(model))
    for name, prompts in tasks.items():
        settings[f"prompts of {name}"] = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    path = args.output / "settings.json"
    if path.exists():
        before = json.loads(path.read_text())
        unknown = [name for name in WEIGHTS if "None" in (before.get(name), settings.get(name))]
        names = {*before, *settings}.difference(unknown)  # a model that was not here yet
        other = [name for name in names if before.get(name) != settings.get(name)]
        if other:
            name = min(other)
            raise ValueError(
                f"--output {args.output}: holds a calibration with {name}={before.get(name)}, not "
                f"{settings.get(name)}; give another folder, or remove this one"
            )
        settings |= {name: before[name] for name in unknown if settings.get(name) == "None"}
    path.write_text(json.dumps(settings, indent=1) + "\n")


def settings_of(args: argparse.Namespace) -> dict[str, int | float | str]:
    """What the result depends on."""
    names = ("model", "search_model", "anchors", "trials", "search", "search_prompts", "max_tokens", "seed")
    given = {name: getattr(args, name) for name in names} | {"tasks": ",".join(args.tasks)}
    return {name: value for name, value in given.items() if value is not None}


def calibrate(args: argparse.Namespace, tasks: dict[str, list[str]]) -> dict[str, Any]:
    """Do what is not done yet; the manifest.

    Raises:
        ValueError: the model to search with has other layers.
    """
    from clasp_vllm.calibration.acceptance import Acceptance, ModelFacts
    from clasp_vllm.calibration.anchors import find_anchors, plot, silhouette
    from clasp_vllm.calibration.store import FORMAT, Manifest, Task, save

    facts = ModelFacts.of(args.model)
    embeddings = embeddings_of(args, tasks)
    anchors = find_anchors(embeddings, args.anchors, args.seed)
    search_prompts = {name: prompts[: args.search_prompts] for name, prompts in tasks.items()}
    search_prompts[EVERYTHING] = [prompt for prompts in search_prompts.values() for prompt in prompts]
    calibrated = []
    for name, prompts in search_prompts.items():
        acceptance = Acceptance(args.search_model or args.model, prompts, args.max_tokens)
        if acceptance.num_layers != facts.num_layers:
            raise ValueError(
                f"--search-model {args.search_model}: has {acceptance.num_layers} layers; allowed are models "
                f"of {facts.num_layers}"
            )
        best, accepted, speedup = search(acceptance, facts.shares, name, args)
        calibrated.append(
            Task(
                name=name,
                skip_attention=sorted(item // 2 for item in best if item % 2 == 0),
                skip_mlp=sorted(item // 2 for item in best if item % 2),
                acceptance=round(accepted, 6),
                speedup=round(speedup, 6),
                trials=args.trials,
            )
        )
        del acceptance  # before the next is loaded
    manifest = Manifest(
        format=FORMAT,
        model=args.model,
        fingerprint=fingerprint(args.model),
        tasks=calibrated,
        silhouette=silhouette(embeddings),
        settings=settings_of(args),
        versions={name: value for name, value in about().items() if name in ("python", "vllm", "torch")}
        | {name: version(name) for name in ("transformers", "scikit-learn")},
        num_layers=facts.num_layers,
        hidden_size=facts.hidden_size,
    )
    save(args.output, manifest, anchors, facts.norms)
    plot(args.output / "anchors.png", list(tasks), embeddings, anchors)
    return manifest.model_dump()


def embeddings_of(args: argparse.Namespace, tasks: dict[str, list[str]]) -> list[Tensor]:
    """By task, [prompts, hidden_size] of the engine, kept in the output folder."""
    import torch
    from safetensors.torch import load_file, save_file

    from clasp_vllm.calibration.anchors import embed

    path = args.output / "embeddings.safetensors"
    if not path.exists():
        prompts = [prompt for group in tasks.values() for prompt in group]
        vectors = embed(args.model, prompts, engine_settings(args.model, args.server_arguments))
        split = torch.split(vectors, [len(group) for group in tasks.values()])
        partial = path.with_suffix(".partial")
        parts = {name: part.contiguous() for name, part in zip(tasks, split, strict=True)}
        save_file(parts, partial)
        partial.rename(path)
    return [load_file(path)[name] for name in tasks]


def search(
    acceptance: Any, shares: Sequence[float], name: str, args: argparse.Namespace
) -> tuple[SkipSet, float, float]:
    """The best set of sub-layers for a task, its acceptance, and what it promises. ``shares``: see there."""
    from rich.progress import Progress

    path = args.output / f"trials-{name}.jsonl"
    known: dict[SkipSet, float] = {}
    if path.exists():  # the last line may have been cut off
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        known = {frozenset(trial["skipped"]): trial["acceptance"] for trial in map(json.loads, whole)}
        path.write_text("".join(whole))

    def accepted(skipped: SkipSet) -> float:
        if skipped not in known:
            known[skipped] = acceptance.of_sublayers(skipped)
            with path.open("a") as file:
                file.write(json.dumps({"skipped": sorted(skipped), "acceptance": known[skipped]}) + "\n")
        return known[skipped]

    with Progress() as progress:
        bar = progress.add_task(name, total=args.trials)
        trials = Trials(
            lambda skipped: promised(accepted(skipped), skipped, shares),
            args.trials,
            lambda: progress.advance(bar),
        )
        best = SEARCHES[args.search](trials, len(shares), first_set(len(shares)), args.seed, True)
    return best, known[best], trials.scores[best]


def first_set(num_items: int) -> SkipSet:
    """Where a search starts: half of the layers, evenly spaced."""
    from clasp_vllm.skipping.skip_mask import evenly_spaced_layers

    layers = evenly_spaced_layers(num_items // 2, num_items // 4)
    return frozenset(2 * layer + part for layer in layers for part in (0, 1))


def promised(acceptance: float, skipped: SkipSet, shares: Sequence[float]) -> float:
    """Tokens per second over plain decoding's, at the best draft length.

    Args:
        shares: [items] of a plain step's time that each sub-layer takes.
    """
    step = 1 - sum(shares[item] for item in skipped) + OVERHEAD
    return max(expected_tokens(acceptance, k) / (1 + k * step) for k in range(1, LONGEST + 1))
