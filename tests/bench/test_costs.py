"""The costs of the parts, measured on a real engine."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from engines import DEMO_MODEL
from fake_target import BLOCK, Target

from clasp_vllm.bench.costs import MadeUpDrafts, Timings, break_even_table, cost_table, layers_kept
from clasp_vllm.bench.profile import Stopwatch
from clasp_vllm.cli import main
from clasp_vllm.drafting.draft import DrafterOptions
from clasp_vllm.drafting.drafter import Drafter
from clasp_vllm.drafting.passes import Passes
from clasp_vllm.drafting.scratch import ScratchBlocks
from clasp_vllm.drafting.sequences import SequenceTable
from clasp_vllm.policies.clasp import Clasp
from clasp_vllm.skipping.skip_mask import layers_mask
from clasp_vllm.tools.cost_model import costs_by_batch


def test_timings_leave_out_the_warm_up():
    timings = Timings(lambda: None)
    timings.seconds["x"] = [100.0, 100.0, 3.0, 1.0, 2.0]
    assert timings.median("x") == 2.0


@torch.inference_mode()
def test_lengths_take_turns_with_the_parts():
    target = Target([[3, 1, 4], [9, 2]])
    scratch = ScratchBlocks(target.cache.scratch_block, 2, 3, BLOCK, torch.device("cpu"))
    passes = Passes(target.decoder(), target.cache, scratch, target.head)
    sequences = SequenceTable(2, layers_mask(6, [1, 2, 3])[None])
    policy = Clasp(sequences, passes, (3,), max_requests=2)
    options = DrafterOptions((3,), 2, 0.0)
    drafter = Drafter(target.decoder(), passes, sequences, policy, options)
    timings = Timings(lambda: None)
    rounds = drafter.observer = MadeUpDrafts(drafter, 2, 4, timings, Stopwatch())

    def sample(hidden, positions, step, rows):
        return target.head(hidden).argmax(-1), torch.zeros(len(rows))

    lengths = []
    for rounds.step in range(10):
        output = drafter.draft(target.batch(), 4, sample)
        assert output.tokens.shape == (2, 4)
        assert output.lengths.tolist() == [max(rounds.length, 0)] * 2
        lengths.append(rounds.length)
    assert lengths == [-1, 0, 1, 2, 4] * 2
    drafts = {("draft", layers, tokens) for layers in layers_kept(6) for tokens in (1, 4)}
    assert timings.seconds.keys() == {"head", "optimization pass", "optimize"} | drafts
    assert {len(seconds) for seconds in timings.seconds.values()} == {2}
    assert (drafter.observer, drafter.policy, drafter.options) == (rounds, policy, options)
    drafter.draft(target.batch().select(np.array([0])), 4, sample)
    assert rounds.length == -1  # another size of the batch


def test_command(tmp_path):
    path = tmp_path / "costs.json"
    command = [sys.executable, "-m", "clasp_vllm.cli", "costs", str(DEMO_MODEL), f"--json={path}"]
    command += ["--batch=1,3", "--repeats=4", "--longest=4", "--"]
    command += [
        "--enforce-eager",
        "--dtype=float32",
        "--max-model-len=512",
        "--kv-cache-memory-bytes=268435456",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    measured = json.loads(path.read_text())
    costs = costs_by_batch(measured)
    assert measured["about"]["model"] == str(DEMO_MODEL)
    assert measured["read_bandwidth"] > 0
    assert measured["bytes_per_token"] == pytest.approx(
        2 * DEMO_MODEL.joinpath("model.safetensors").stat().st_size, rel=0.01
    )
    assert costs.keys() == {1, 3}
    for one in costs.values():
        assert one.step.keys() == {0, 1, 2, 4}
        assert min(one.step.values()) > 0
        # A layer of this model takes far longer than nothing and far less than a step.
        assert 0 < one.layer < one.step[0]
        assert one.layer < one.optimize
    for samples in measured["samples"]:
        assert all(len(samples[str(("step", k))]) >= 4 for k in (0, 1, 2, 4))
    assert cost_table(list(costs.values())) in result.stdout
    assert break_even_table(list(costs.values()), 24, 4) in result.stdout


@pytest.mark.parametrize(
    ("option", "part"),
    [
        ("--longest=1", "allowed are integers from 2 on"),
        ("--batch=0", "allowed are integers from 1 on"),
        ("--repeats=2", "allowed are integers from 3 on"),
        ("--skip-ratio=1.5", "skip_ratio=1.5"),
    ],
)
def test_bad_options(option, part, capsys):
    try:
        status = main(["costs", "model", option])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    assert part in capsys.readouterr().err
