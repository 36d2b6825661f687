"""The benchmark: ratios of neighbouring measurements, and a report."""

import argparse
import json
from itertools import pairwise

import pytest

from clasp_vllm.bench.report import pairs, predicted_ratio, ratio, spread, write_report
from clasp_vllm.bench.serving import accepted, workloads
from clasp_vllm.bench.serving_options import METHODS, add_arguments, fill_in, read_costs
from clasp_vllm.config import is_ours, parse_config
from clasp_vllm.tools.cost_model import costs_by_batch
from clasp_vllm.tools.prompts import (
    HELD_OUT,
    TASKS,
    WARM_UP,
    answer_length,
    datasets,
    mixed_prompts,
    number_of_prompts,
    task_prompts,
)

# Two rounds of two sequences: 5 drafts each, 6 steps of 3 layers in all, one mask found.
COUNTERS = {
    "spec_decode_num_drafts": 4,
    "spec_decode_num_draft_tokens": 20,
    "spec_decode_num_accepted_tokens": 12,
    "layer_skip_rounds": 2,
    "layer_skip_steps": 6,
    "layer_skip_sublayers": 36,
    "layer_skip_optimized": 1,
}
COSTS = {
    "batch": 1,
    "step": {"0": 10.0, "10": 20.0},
    "layer": 1.0,
    "draft": 0.5,
    "head": 0.5,
    "drafting": 1.0,
    "optimize": 14.0,
}


def row(method: str, plain: bool, repeat: int, speed: float, text: str = "a", task: str = "maths") -> dict:
    return {
        "method": method,
        "plain": plain,
        "workload": {"task": task, "concurrency": 1, "temperature": 0.0},
        "repeat": repeat,
        "tokens_per_second": speed,
        "accepted_length": None if plain else 2.5,
        "acceptance_by_position": [] if plain else [0.9, 0.6],
        "ttft_p50": 10.0,
        "tpot_p50": 5.0,
        "tpot_p95": 6.0,
        "failed": 0,
        "counters": {} if plain or method == "y" else COUNTERS,
        "texts": [text, "b"],
    }


def test_a_stream_of_tasks_that_change_more_or_less_often():
    task_of = {prompt: task for task in TASKS for prompt in task_prompts(task)}

    def changes(ratio: float) -> float:
        tasks = [task_of[prompt] for prompt in mixed_prompts(25, ratio)]
        assert sorted(tasks) == sorted(5 * TASKS)
        return sum(a != b for a, b in pairwise(tasks)) / 24

    assert changes(0) == 4 / 24
    assert changes(1) == 1.0
    assert changes(0.25) < changes(0.5) < changes(0.75) < 1.0
    assert mixed_prompts(50, 0.5)[25:] == mixed_prompts(25, 0.5)
    args = options("--tasks=mixed,mixed/0.5", "--concurrency=1")
    fill_in(args)
    assert [w.task for w in workloads(args) if w.temperature == 0] == ["mixed", "mixed/0.5"]
    # Whatever the ratio, the same prompts are asked.
    assert number_of_prompts(5, 1, "mixed/0") == number_of_prompts(5, 1, "mixed/1") == 25
    assert number_of_prompts(5, 16, "mixed/0.5") == 50
    assert number_of_prompts(5, 1, "mixed") == 5


def test_answers_differ_in_length():
    lengths = [answer_length(i, 40, equal=False) for i in range(100)]
    assert 20 <= min(lengths) < 24
    assert 56 < max(lengths) <= 60
    assert sum(lengths) / 100 == pytest.approx(40, abs=1)
    assert {answer_length(i, 40, equal=True) for i in range(9)} == {40}
    assert answer_length(0, 1, equal=False) == 1


def test_a_picture_of_domain_shift(tmp_path):
    rows = [
        row("x", plain, 0, 100.0 if plain else speed, task=task)
        for task, speed in (("mixed", 120.0), ("mixed/0", 150.0))
        for plain in (True, False)
    ]
    write_report(RESULTS | {"measurements": rows}, tmp_path)
    assert (tmp_path / "ratio-domain-shift.png").read_bytes().startswith(b"\x89PNG")


def test_a_load_that_rises_and_falls():
    args = options("--tasks=maths,mixed", "--concurrency=2,1-4-16-4")
    fill_in(args)
    assert args.concurrency == [2, "1-4-16-4"]
    assert [(w.task, w.concurrency) for w in workloads(args) if w.temperature == 0] == [
        ("maths", 2),
        ("mixed", 2),
        ("mixed", "1-4-16-4"),
    ]


def test_acceptance_from_the_counters():
    assert accepted({"layer_skip_plain_steps": 3.0}) == (None, [])
    positions = {f"spec_decode_num_accepted_tokens_per_pos[{i}]": n for i, n in enumerate((4.0, 2.0))}
    length, by_position = accepted(COUNTERS | positions)
    assert length == 4.0
    assert by_position == [1.0, 0.5]


RESULTS = {
    "about": {"command": "clasp-vllm bench", "machine": "a machine", "date": "a day"},
    "methods": {"x": "{}", "y": "{}"},
    "measurements": [
        row("x", True, 0, 100.0),
        row("x", False, 0, 150.0),
        row("x", False, 1, 100.0, "other"),
        row("x", True, 1, 50.0),
        row("y", True, 0, 80.0),
        row("y", False, 0, 40.0),
        row("y", False, 1, 1.0),  # interrupted: no neighbour
    ],
}


def test_ratios_are_of_neighbours():
    ratios = {key[0]: [ratio(pair) for pair in both] for key, both in pairs(RESULTS).items()}
    assert ratios == {"x": [1.5, 2.0], "y": [0.5]}
    assert spread(ratios["x"]) == "1.75 (1.50 to 2.00)"


def test_report(tmp_path):
    write_report(RESULTS, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "a machine" in text
    line = next(line for line in text.splitlines() if line.startswith("| x |"))
    assert "| 1.75 (1.50 to 2.00) | 75.0 | 125.0 | 2.50 | 0.90 0.60 |" in line
    assert line.endswith("| 3 of 4 |")
    assert (tmp_path / "ratio-temperature-0.png").read_bytes().startswith(b"\x89PNG")


def test_prediction_by_hand():
    """4 tokens are 40 of plain decoding; 5 verified 15, 3 steps of 4, half a pass of 14 and 1 besides 35."""
    costs = costs_by_batch({"costs": [COSTS]})[1]
    assert predicted_ratio(costs, COUNTERS) == pytest.approx(40 / 35)


def test_report_with_costs_and_profiles(tmp_path):
    profile = {"method": "x", "batch": 4, "tokens": 50, "seconds": 10.0}
    profile["parts"] = {"verify: forward": 5.0, "verify: head": 1.0, "draft: head": 2.0, "else": 2.0}
    costs = {"about": {"model": "m", "machine": "the same", "date": "today"}, "costs": [COSTS]}
    write_report(RESULTS | {"costs": costs, "profiles": [profile]}, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "| x | maths | 1 | 0 | 1.00 (1.00 to 1.00) | 1.14 (1.14 to 1.14) |" in text
    assert "| y | maths | 1 | 0 |" not in text.split("Predicted")[1]  # not ours: nothing was counted
    assert "| x | 4 | 5.0 | 60.0% | 20.0% | 0.0% | 20.0% |" in text


def test_single_tasks_never_ask_a_prompt_beside_itself():
    args = options("--tasks=maths,mixed", "--concurrency=1,4,8")
    fill_in(args)
    assert [(w.task, w.concurrency) for w in workloads(args) if w.temperature == 0] == [
        ("maths", 1), ("maths", 4), ("mixed", 1), ("mixed", 4), ("mixed", 8)
    ]  # fmt: skip


def test_what_is_measured_is_not_what_is_calibrated_on(tmp_path):
    args = options("--tasks=maths,mixed", "--concurrency=16")
    fill_in(args)
    datasets(args, tmp_path)

    def asked(task):
        return {json.loads(line)["prompt"] for line in (tmp_path / f"{task}.jsonl").read_text().splitlines()}

    assert len(asked("maths")) == HELD_OUT
    assert len(asked("mixed")) == 25
    assert asked(WARM_UP).isdisjoint(asked("mixed") | asked("maths"))
    assert asked(WARM_UP) >= {task_prompts(task)[-1] for task in TASKS}


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["model", *arguments])


def test_defaults():
    args = options()
    assert fill_in(args).keys() == METHODS.keys()
    assert args.concurrency == [1, 2, 4, 8, 16]
    for config in METHODS.values():
        if is_ours(config):
            parse_config(config)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--tasks", "chemistry"], "--tasks chemistry: allowed are maths"),
        (["--tasks", "mixed/2"], "--tasks mixed/2: allowed are maths"),
        (["--tasks", "spec_bench/qa"], "needs --spec-bench"),
        (["--tasks", "maths", "--prompts", "9"], "--prompts 9: --tasks maths has 5"),
        (["--costs", "missing.json"], "--costs missing.json: not written by clasp-vllm costs"),
        (["--method", "fast"], "--method fast: allowed is NAME=CONFIG"),
    ],
)
def test_bad_options(arguments, part):
    with pytest.raises(ValueError, match=part):
        fill_in(options(*arguments))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "not written by"),
        ('{"costs": null}', "not written by"),
        ('{"costs": [], "about": {"model": "other"}}', "these are the costs of other, not of model"),
    ],
)
def test_costs_of_something_else(tmp_path, content, part):
    path = tmp_path / "costs.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=part):
        read_costs(path, "model")


@pytest.mark.parametrize("option", ["--repeats=0", "--concurrency=1,x", "--max-tokens=0"])
def test_numbers_out_of_range(option, capsys):
    with pytest.raises(SystemExit):
        options(option)
    assert "allowed are integers from 1 on" in capsys.readouterr().err
