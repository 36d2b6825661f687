"""A benchmark's results as a Markdown table and plots."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from clasp_vllm.tools.cost_model import Costs, costs_by_batch
from clasp_vllm.tools.prompts import mix_ratio
from clasp_vllm.tools.spec_bench import GROUPS, TASK

Row = dict[str, Any]
# (plain, method) measurements by method, task, load and temperature. A load that rises and falls is text.
Pairs = dict[tuple[str, str, int | str, float], list[tuple[Row, Row]]]


def pairs(results: dict[str, Any]) -> Pairs:
    """(plain, method) measurements made next to each other, by method, task, concurrency, temperature."""
    by_place: dict[tuple[Any, ...], dict[bool, Row]] = defaultdict(dict)
    for row in results["measurements"]:
        workload = row["workload"]
        key = (row["method"], workload["task"], workload["concurrency"], workload["temperature"])
        by_place[(*key, row["repeat"])][row["plain"]] = row
    all_pairs: Pairs = defaultdict(list)
    for place, by_plain in by_place.items():
        if len(by_plain) == 2:
            all_pairs[place[:4]].append((by_plain[True], by_plain[False]))
    return all_pairs


def _place(item: tuple[tuple[str, str, int | str, float], Any]) -> tuple[Any, ...]:
    """Where a row stands in a table: by name and task, then by load, rising ones first."""
    method, task, load, temperature = item[0]
    return method, task, isinstance(load, str), load, temperature


def ratio(pair: tuple[Row, Row]) -> float:
    """The method's tokens per second over plain vLLM's."""
    plain, method = pair
    return float(method["tokens_per_second"] / plain["tokens_per_second"])


def spread(values: list[float]) -> str:
    """Median, and smallest to largest where there are several."""
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f} to {max(values):.2f})"


def write_report(results: dict[str, Any], folder: Path) -> None:
    """Write results.md and the plots into ``folder``."""
    all_pairs = pairs(results)
    facts = results["about"]
    lines = ["# Results", ""]
    lines += [f"- {name}: {f'`{value}`' if name == 'command' else value}" for name, value in facts.items()]
    lines += [
        "",
        "Ratio: tokens per second over plain vLLM's, of neighbouring measurements; median (range).",
        "",
    ]
    groups = _groups(all_pairs)
    if groups:
        lines += ["Spec-Bench by its groups; the mean is the geometric one of the medians:", "", *groups, ""]
    lines += _table(all_pairs)
    first = _first_repeats(all_pairs)
    if first:
        lines += ["", "## The first repeat after a start, and later ones", "", *first]
    if results.get("costs"):
        lines += [
            "",
            "## Predicted from the costs of the parts",
            "",
            *_predictions(all_pairs, results["costs"]),
        ]
    if results.get("profiles"):
        lines += ["", "## Where the time goes", "", *_profiles(results["profiles"])]
    lines += ["", "## Methods", ""]
    lines += [f"- {name}: `{config}`" for name, config in results["methods"].items()]
    (folder / "results.md").write_text("\n".join(lines) + "\n")
    _plots(all_pairs, folder)


def _table(all_pairs: Pairs) -> list[str]:
    lines = [
        "| method | task | at once | temperature | ratio | tokens/s, plain | tokens/s | accepted length | "
        "by position | TPOT p50, plain | TPOT p50 | p95 | TTFT p50, plain | TTFT p50 | same greedy answers |",
        "|" + "---|" * 15,
    ]
    for (method, task, concurrency, temperature), repeats in sorted(all_pairs.items(), key=_place):
        plain = [pair[0] for pair in repeats]
        rows = [pair[1] for pair in repeats]

        def middle(group: list[Row], key: str) -> float:
            return float(statistics.median(row[key] for row in group))

        lengths = [row["accepted_length"] for row in rows if row["accepted_length"]]
        positions = rows[-1]["acceptance_by_position"]
        same = [a == b for x, y in repeats for a, b in zip(x["texts"], y["texts"], strict=True)]
        lines.append(
            f"| {method} | {task} | {concurrency} | {temperature:g} | {spread([ratio(p) for p in repeats])} "
            f"| {middle(plain, 'tokens_per_second'):.1f} | {middle(rows, 'tokens_per_second'):.1f} "
            f"| {f'{statistics.median(lengths):.2f}' if lengths else ''} "
            f"| {' '.join(f'{rate:.2f}' for rate in positions)} "
            f"| {middle(plain, 'tpot_p50'):.1f} ms | {middle(rows, 'tpot_p50'):.1f} ms "
            f"| {middle(rows, 'tpot_p95'):.1f} ms "
            f"| {middle(plain, 'ttft_p50'):.0f} ms | {middle(rows, 'ttft_p50'):.0f} ms "
            f"| {f'{sum(same)} of {len(same)}' if temperature == 0 else ''} |"
        )
    return lines


def _groups(all_pairs: Pairs) -> list[str]:
    """Ratios by Spec-Bench's groups, and the geometric mean of the medians of those there are."""
    names = [f"{TASK}/{group}" for group in GROUPS]
    group_pairs = {key: repeats for key, repeats in all_pairs.items() if key[1] in names}
    names = [name for name in names if any(key[1] == name for key in group_pairs)]
    if len(names) < 2:
        return []
    lines = [
        f"| method | at once | temperature | {' | '.join(name.partition('/')[2] for name in names)} | mean |",
        "|" + "---|" * (len(names) + 4),
    ]
    for method, load, temperature in dict.fromkeys((key[0], *key[2:]) for key in group_pairs):
        ratios = [
            [ratio(p) for p in group_pairs.get((method, name, load, temperature), [])] for name in names
        ]
        medians = [statistics.median(values) for values in ratios if values]
        cells = [spread(values) if values else "" for values in ratios]
        mean = f"{statistics.geometric_mean(medians):.2f}" if len(medians) == len(names) else ""
        lines.append(f"| {method} | {load} | {temperature:g} | {' | '.join(cells)} | {mean} |")
    return lines


def _first_repeats(all_pairs: Pairs) -> list[str]:
    """Ratios of the first repeats apart from those of the later ones, if there are any of these."""
    if all(is_first(pair[1]) for repeats in all_pairs.values() for pair in repeats):
        return []
    lines = [
        "Answers before: what the method's server had answered since its start, warming up included.",
        "",
        "| method | task | at once | temperature | answers before | first repeat | later repeats |",
        "|" + "---|" * 7,
    ]
    for (method, task, load, temperature), repeats in sorted(all_pairs.items(), key=_place):
        first, later = ([pair for pair in repeats if is_first(pair[1]) == wanted] for wanted in (True, False))
        before = ", ".join(str(pair[1].get("answers_before", "")) for pair in first)
        cells = [spread([ratio(pair) for pair in part]) if part else "" for part in (first, later)]
        lines.append(f"| {method} | {task} | {load} | {temperature:g} | {before} | {' | '.join(cells)} |")
    return lines


def is_first(row: Row) -> bool:
    """Whether it is of the first repeat of a run, also where several runs were made one."""
    return bool(row.get("first_repeat", row["repeat"] == 0))


def _predictions(all_pairs: Pairs, costs: Any) -> list[str]:
    """Measured ratios beside those that the cost model gives for the drafting that was counted."""
    known, facts = costs_by_batch(costs), costs["about"]
    lines = [
        f"Of decoding alone (ratio of median times per token). Costs: {facts['machine']}, {facts['date']}.",
        "",
        "| method | task | at once | temperature | measured | predicted |",
        "|---|---|---|---|---|---|",
    ]
    for (method, task, concurrency, temperature), repeats in sorted(all_pairs.items(), key=_place):
        if concurrency in known and all(pair[1]["counters"].get("layer_skip_rounds") for pair in repeats):
            predicted = [predicted_ratio(known[concurrency], pair[1]["counters"]) for pair in repeats]
            measured = [pair[0]["tpot_p50"] / pair[1]["tpot_p50"] for pair in repeats]
            lines.append(
                f"| {method} | {task} | {concurrency} | {temperature:g} | {spread(measured)} "
                f"| {spread(predicted)} |"
            )
    return lines


def predicted_ratio(costs: Costs, counters: dict[str, float]) -> float:
    """The ratio to plain vLLM that the costs give for a method of ours that counted this."""
    rounds, drafts = counters["layer_skip_rounds"], counters["spec_decode_num_drafts"]
    steps = counters["layer_skip_steps"]
    return costs.ratio(
        tokens=1 + counters["spec_decode_num_accepted_tokens"] / drafts,
        verified=counters["spec_decode_num_draft_tokens"] / drafts,
        draft_steps=steps / rounds,
        num_layers=counters.get("layer_skip_sublayers", 0) / 2 / max(steps, 1),
        optimizations=counters.get("layer_skip_optimized", 0) / rounds,
    )


def _profiles(profiles: list[dict[str, Any]]) -> list[str]:
    """Shares of wall time by method; they add up."""
    lines = [
        "Continuous batches of one process, without a server.",
        "",
        "| method | batch | tokens/s | verify | draft | optimise | everything else |",
        "|---|---|---|---|---|---|---|",
    ]
    for profile in profiles:
        shares = [
            sum(s for part, s in profile["parts"].items() if part.startswith(name)) / profile["seconds"]
            for name in ("verify", "draft", "optimise")
        ]
        cells = [profile["method"], str(profile["batch"]), f"{profile['tokens'] / profile['seconds']:.1f}"]
        cells += [f"{share:.1%}" for share in (*shares, 1 - sum(shares))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _line(axis: Any, points: dict[float, list[float]], label: str) -> None:
    """Median and range of ratios over what lies on the x axis."""
    at = sorted(points)
    middle = [statistics.median(points[x]) for x in at]
    low = [m - min(points[x]) for m, x in zip(middle, at, strict=True)]
    high = [max(points[x]) - m for m, x in zip(middle, at, strict=True)]
    axis.errorbar(at, middle, yerr=[low, high], marker="o", capsize=3, label=label)


def _finish(figure: Any, axes: Any, path: Path) -> None:
    from matplotlib import pyplot

    for axis in axes:
        axis.axhline(1.0, color="black", linewidth=0.8)
    axes[0].set_ylabel("tokens per second, ratio to plain vLLM")
    axes[-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _plots(all_pairs: Pairs, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    _plot_loads(all_pairs, folder)
    _plot_shift(all_pairs, folder)


def _plot_shift(all_pairs: Pairs, folder: Path) -> None:
    """Ratios by how often the task of the stream changes."""
    from matplotlib import pyplot

    mixed_pairs = {key: repeats for key, repeats in all_pairs.items() if mix_ratio(key[1]) is not None}
    if len({key[1] for key in mixed_pairs}) < 2:
        return
    figure, axis = pyplot.subplots(figsize=(6.5, 3.6))
    lines: dict[str, dict[float, list[float]]] = {}
    for (method, task, load, temperature), repeats in mixed_pairs.items():
        name = f"{method}, {load} at once, temperature {temperature:g}"
        lines.setdefault(name, {})[mix_ratio(task) or 0.0] = [ratio(pair) for pair in repeats]
    for name, points in lines.items():
        _line(axis, points, name)
    axis.set(xlabel="prompts of another task than the one before")
    _finish(figure, [axis], folder / "ratio-domain-shift.png")


def _plot_loads(all_pairs: Pairs, folder: Path) -> None:
    from matplotlib import pyplot

    for temperature in sorted({key[3] for key in all_pairs}):
        ratios = {
            key: [ratio(p) for p in repeats]
            for key, repeats in all_pairs.items()
            if key[3] == temperature and isinstance(key[2], int)
        }
        if not ratios:
            continue
        methods, tasks = sorted({key[0] for key in ratios}), sorted({key[1] for key in ratios})
        figure, axes = pyplot.subplots(1, len(tasks), figsize=(3.2 * len(tasks) + 2, 3.6), squeeze=False)
        for axis, task in zip(axes[0], tasks, strict=True):
            for method in methods:
                points = {float(key[2]): v for key, v in ratios.items() if key[:2] == (method, task)}
                _line(axis, points, method)
            axis.set(title=task, xlabel="requests at once", xscale="log")
            axis.set_xticks(sorted({key[2] for key in ratios}), minor=False)
            axis.xaxis.set_major_formatter("{x:.0f}")
            axis.minorticks_off()
        figure.suptitle(f"temperature {temperature:g}")
        _finish(figure, axes[0], folder / f"ratio-temperature-{temperature:g}.png")
