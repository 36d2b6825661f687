"""The costs of the parts: how they are timed, and options that are refused."""

import numpy as np
import pytest
import torch
from fake_target import BLOCK, Target

from clasp_vllm.bench.costs import MadeUpDrafts, Timings, layers_kept
from clasp_vllm.bench.profile import Stopwatch
from clasp_vllm.cli import main
from clasp_vllm.drafting.draft import DrafterOptions
from clasp_vllm.drafting.drafter import Drafter
from clasp_vllm.drafting.passes import Model, Passes
from clasp_vllm.drafting.scratch import ScratchBlocks
from clasp_vllm.drafting.sequences import SequenceTable
from clasp_vllm.policies.clasp import Clasp
from clasp_vllm.skipping.skip_mask import layers_mask


def test_timings_leave_out_the_warm_up():
    timings = Timings(lambda: None)
    timings.seconds["x"] = [100.0, 100.0, 3.0, 1.0, 2.0]
    assert timings.median("x") == 2.0


@torch.inference_mode()
def test_lengths_take_turns_with_the_parts():
    target = Target([[3, 1, 4], [9, 2]])
    scratch = ScratchBlocks(target.cache.scratch_block, 2, 3, BLOCK, torch.device("cpu"))
    passes = Passes(Model(target.decoder(), target.head), target.cache, scratch)
    sequences = SequenceTable(2, layers_mask(6, [1, 2, 3])[None])
    policy = Clasp(sequences, passes, (3,), max_requests=2)
    options = DrafterOptions((3,), (None,), 2, 0.0)
    drafter = Drafter(target.decoder(), passes, sequences, policy, options)
    timings = Timings(lambda: None)
    rounds = drafter.observer = MadeUpDrafts(drafter, 2, 4, timings, Stopwatch())

    def sample(hidden, positions, step, rows, exact=None):
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
