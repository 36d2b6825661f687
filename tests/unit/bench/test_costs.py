"""The costs of the parts: how they are timed, and options that are refused."""

import pytest

from clasp_vllm.bench.costs import Timings
from clasp_vllm.cli import main


def test_timings_leave_out_the_warm_up():
    timings = Timings(lambda: None)
    timings.seconds["x"] = [100.0, 100.0, 3.0, 1.0, 2.0]
    assert timings.median("x") == 2.0


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
