"""What calibrate notices before an engine starts, what a set promises, and checkpoints told apart."""

import argparse
import json
import shutil

import pytest
from engines import DEMO_MODEL

from clasp_vllm.calibration.calibrate import OVERHEAD, promised
from clasp_vllm.calibration.fingerprint import fingerprint
from clasp_vllm.cli import main


def test_prompts_that_changed_are_noticed(tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    arguments = ["calibrate", str(DEMO_MODEL), f"--output={tmp_path / 'out'}", f"--tasks=mine={prompts}"]
    from clasp_vllm.calibration import calibrate

    for text in ("one", "two"):
        prompts.write_text(json.dumps({"prompt": text}) + "\n" + json.dumps({"prompt": "x"}) + "\n")
        if text == "one":  # as if it had been interrupted at once
            args = cli_arguments(arguments)
            args.output.mkdir()
            calibrate.keep_settings(args, calibrate.tasks_of(args))
        else:
            assert main(arguments) == 2
    assert "holds a calibration with prompts of mine=" in " ".join(capsys.readouterr().err.split())


def cli_arguments(words: list[str]) -> argparse.Namespace:
    from clasp_vllm.calibration.calibrate import add_arguments

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words[1:], argparse.Namespace(server_arguments=[]))


def test_what_a_set_promises_by_hand():
    """Half the time skipped, every token accepted: 9 tokens for 1 + 8 (0.5 + overhead) plain steps."""
    shares = [0.25, 0.25, 0.2, 0.2]
    assert promised(1.0, frozenset({0, 1}), shares) == pytest.approx(9 / (1 + 8 * (0.5 + OVERHEAD)))
    assert promised(0.0, frozenset({0}), shares) < 1


def test_a_checkpoint_in_the_hubs_cache(tmp_path):
    """Told by the files that its index names; the rest of the repository need not be there."""
    snapshot = tmp_path / "models--someone--model" / "snapshots" / "abc"
    shutil.copytree(DEMO_MODEL, snapshot)
    references = tmp_path / "models--someone--model" / "refs"
    references.mkdir()
    (references / "main").write_text("abc")
    expected = fingerprint(str(DEMO_MODEL))
    assert expected is not None
    assert fingerprint("someone/model", cache=str(tmp_path)) == expected
    assert fingerprint("someone/other", cache=str(tmp_path)) is None
    assert fingerprint("no name at all", cache=str(tmp_path)) is None
    index = {"weight_map": {"a": "model.safetensors", "b": "not-here.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fingerprint("someone/model", cache=str(tmp_path)) is None


def test_a_model_that_was_not_here_yet_is_no_other(tmp_path):
    from clasp_vllm.calibration import calibrate

    args = cli_arguments(["calibrate", "someone/model-not-here", f"--output={tmp_path}"])
    tasks = calibrate.tasks_of(args)
    calibrate.keep_settings(args, tasks)
    assert json.loads((tmp_path / "settings.json").read_text())["weights"] == "None"
    settings = json.loads((tmp_path / "settings.json").read_text()) | {"weights": "known"}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    calibrate.keep_settings(args, tasks)
    assert json.loads((tmp_path / "settings.json").read_text()) == settings
