"""The command clasp-vllm."""

import subprocess
import sys

import pytest
from engines import ROOT

from clasp_vllm.cli import main


def test_check_explains(capsys):
    assert main(["check", str(ROOT / "configs" / "clasp.yaml"), "--num-layers", "24"]) == 0
    output = capsys.readouterr().out
    assert "layers skipped: up to 16 of 24" in output
    assert "no speculation where it does not pay" in output


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nowhere.yaml"], "no such file"),
        (['{"method": "clasp", "num_skipped_layers": 24}', "--num-layers", "24"], "0 to 23"),
        (['{"method": "ngram"}'], "'clasp', 'knn_ssd' or 'layer_skip'"),
    ],
)
def test_check_refuses(arguments, part, capsys):
    assert main(["check", *arguments]) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "command", ["keys", "check", "bench", "profile", "costs", "search", "calibrate", "model", "widen"]
)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: clasp-vllm {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["keys"], ["check", '{"method": "clasp"}']], ids=["keys", "check"])
def test_configurations_need_no_vllm(arguments):
    """In an environment that has neither vLLM nor torch."""
    code = (
        "import sys; sys.modules.update(vllm=None, torch=None); "  # so that importing them fails
        f"from clasp_vllm.cli import main; sys.exit(main({arguments!r}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "clasp" in result.stdout
