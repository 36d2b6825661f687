"""Every bad configuration gets one clear message: the key, the value and what is allowed."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from engines import ROOT
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from clasp_vllm.config import (
    CHOICES,
    ConfigError,
    LayerSkipConfig,
    explain,
    is_ours,
    parse_config,
    read_settings,
    resolve,
)

BAD = [
    ({"method": "clasp", "skip_raito": 0.5}, ["skip_raito=0.5", "did you mean skip_ratio?", "allowed keys"]),
    ({"method": "clasp", "model": "x"}, ["unknown key model='x'"]),
    ({"method": "clasp", "max_model_len": 64}, ["unknown key max_model_len=64"]),  # vLLM issue 52258
    ({"method": "clasp", "skip_ratio": 1.0}, ["skip_ratio=1.0", "less than 1"]),
    ({"method": "clasp", "skip_ratio": -0.1}, ["skip_ratio=-0.1", "greater than or equal to 0"]),
    ({"method": "clasp", "skip_ratio": "half"}, ["skip_ratio='half'", "number"]),
    ({"method": "clasp", "num_skipped_layers": -1}, ["num_skipped_layers=-1", "greater than or equal to 0"]),
    (
        {"method": "clasp", "num_speculative_tokens": 0},
        ["num_speculative_tokens=0", "greater than or equal to 1"],
    ),
    (
        {"method": "clasp", "num_speculative_tokens": 65},
        ["num_speculative_tokens=65", "less than or equal to 64"],
    ),
    ({"method": "clasp", "num_speculative_tokens": "5"}, ["num_speculative_tokens='5'", "integer"]),
    ({"method": "clasp", "num_speculative_tokens": True}, ["num_speculative_tokens=True", "integer"]),
    (
        {"method": "clasp", "optimization_interval": 0},
        ["optimization_interval=0", "greater than or equal to 1"],
    ),
    ({"method": "clasp", "max_optimized_requests": 0}, ["max_optimized_requests=0"]),
    ({"method": "clasp", "draft_exit_threshold": 1}, ["draft_exit_threshold=1", "less than 1"]),
    (
        {"method": "clasp", "draft_sample_method": "beam"},
        ["draft_sample_method='beam'", "'greedy' or 'probabilistic'"],
    ),
    (  # of vLLM 0.33, and not lossless
        {"method": "clasp", "rejection_sample_method": "fly"},
        ["rejection_sample_method='fly'", "'standard', 'synthetic' or 'block'"],
    ),
    ({"method": "clasp", "skip_ratio": 0.5, "num_skipped_layers": 3}, ["skip_ratio and num_skipped_layers"]),
    ({"method": "clasp", "skip_layers": [1]}, ["skip_layers=[1]", "method: layer_skip"]),
    ({"method": "layer_skip", "skip_layers": [1, 1]}, ["skip_layers=[1, 1]", "twice"]),
    ({"method": "layer_skip", "skip_layers": [-1]}, ["skip_layers=[-1]"]),
    ({"method": "layer_skip", "skip_layers": [1], "skip_ratio": 0.5}, ["skip_ratio and skip_layers"]),
    ({"method": "layer_skip", "optimization_interval": 4}, ["optimization_interval=4", "method: clasp"]),
    ({"skip_ratio": 0.5}, ["method=None", "required"]),
    ({"method": "knn_ssd"}, ["calibration=None", "method: knn_ssd needs it"]),
    (
        {"method": "knn_ssd", "calibration": "x", "skip_ratio": 0.5},
        ["skip_ratio=0.5", "clasp or layer_skip"],
    ),
    ({"method": "clasp", "calibration": "x"}, ["calibration='x'", "method: knn_ssd"]),
    ({"method": "swift"}, ["method='swift' was removed", "clasp, knn_ssd, layer_skip"]),
    ({"method": "clasp", "adaptive": ["sharing"]}, ["sharing was removed", "layers, length, exit"]),
    ({"method": "clasp", "adaptive": 5}, ["adaptive=5"]),
    ({"method": "clasp", "granularity": "sublayer"}, ["granularity='sublayer' was removed", "leave it out"]),
    ({"method": "clasp", "adaptive": ["depth"]}, ["adaptive=['depth']", "'speculation'"]),
    (
        {"method": "clasp", "adaptive": ["layers"], "num_skipped_layers": 3},
        ["adaptive=['layers']", "num_skipped_layers fixes them"],
    ),
    (
        {"method": "clasp", "adaptive": ["exit"], "draft_exit_threshold": 0.5},
        ["adaptive=['exit']", "draft_exit_threshold fixes it"],
    ),
    (
        {"method": "knn_ssd", "calibration": "x", "adaptive": ["layers"]},
        ["adaptive=['layers']", "method: knn_ssd fixes them"],
    ),
    (
        {"method": "clasp", "num_speculative_tokens_per_batch_size": [[1, 2, "3"]]},
        ["num_speculative_tokens_per_batch_size", "integer"],
    ),
    ({"method": "clasp", "draft_context": 0}, ["draft_context=0", "greater than or equal to 1"]),
    ({"method": "clasp", "draft_context": "half"}, ["draft_context='half'", "'full' or 'auto'"]),
    (
        {"method": "layer_skip", "draft_context": "auto"},
        ["draft_context='auto'", "needs adaptive: true", "full and a number"],
    ),
    ({"method": "clasp", "draft_weights": "int3"}, ["draft_weights='int3'", "'fp8', 'int4' or 'auto'"]),
    (
        {"method": "clasp", "draft_weights": "int4", "draft_weights_group_size": 48},
        ["draft_weights_group_size=48", "32, 64 or 128"],
    ),
    (
        {"method": "clasp", "draft_weights": "int8", "draft_weights_group_size": 64},
        ["draft_weights_group_size=64", "draft_weights: int4 or auto", "not with draft_weights: int8"],
    ),
    ({"method": "clasp", "synthetic_acceptance_rates": [2.0]}, ["synthetic_acceptance_rates=[2.0]"]),
    ({"method": "clasp", "synthetic_acceptance_length": 0.5}, ["synthetic_acceptance_length=0.5"]),
]


@pytest.mark.parametrize(("settings", "parts"), BAD, ids=[json.dumps(s) for s, _ in BAD])
def test_bad_settings(settings, parts):
    with pytest.raises(ConfigError) as error:
        parse_config(settings)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("settings", "num_layers", "parts"),
    [
        ({"method": "clasp", "num_skipped_layers": 24}, 24, ["num_skipped_layers", "24", "0 to 23"]),
        ({"method": "clasp", "skip_ratio": 0.99}, 24, ["skip_ratio", "24", "0 to 23"]),
        ({"method": "layer_skip", "skip_layers": [3, 24]}, 24, ["skip_layers: 24", "0 to 23"]),
        ({"method": "layer_skip", "skip_layers": [0, 1]}, 2, ["skip_layers", "leaves none"]),
    ],
)
def test_more_than_the_model_has(settings, num_layers, parts):
    config = parse_config(settings)
    with pytest.raises(ConfigError) as error:
        resolve(config, num_layers, max_num_seqs=8)
    for part in parts:
        assert part in str(error.value)


NOTHING_SKIPPED = {"method": "layer_skip", "skip_layers": [], "draft_weights": "auto"}


@pytest.mark.parametrize(
    "settings",
    [
        NOTHING_SKIPPED,
        NOTHING_SKIPPED | {"adaptive": ["length"]},
        {"method": "clasp", "adaptive": False, "skip_ratio": 0.01, "draft_weights": "auto"},
    ],
)
def test_drafts_that_may_gain_nothing_need_somebody_to_switch_them_off(settings):
    with pytest.raises(ConfigError, match=r"draft_weights='auto'.*adaptive: true"):
        resolve(parse_config(settings), 24, max_num_seqs=8)


@pytest.mark.parametrize(
    "other",
    [{"adaptive": True}, {"adaptive": ["speculation"]}, {"skip_layers": [3]}, {"draft_weights": "int8"}],
)
def test_drafts_that_gain_something_or_can_be_switched_off(other):
    assert resolve(parse_config(NOTHING_SKIPPED | other), 24, max_num_seqs=8)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("- method: clasp\n", "a list"),
        ("", "nothing"),
        ("clasp", "'clasp'"),
        ("1: 2", "keys that are not text"),
        ("method: [clasp", "cannot be read"),
        ("method: !!python/object:os.system x", "cannot be read"),
        ("a: !!bool x", "cannot be read"),
        ("a: !!timestamp x", "cannot be read"),
        ("a: !!int ''", "cannot be read"),
        ("skip_ratio: " + "9" * 5000, "cannot be read"),
        ("[" * 20_000, "cannot be read: maximum recursion depth exceeded"),
        ("a: " + "{" * 20_000, "cannot be read: maximum recursion depth exceeded"),
        ("method: &m clasp\nadaptive: *m", "the alias *m is not allowed: write the value out"),
        ("method: &m {<<: *m}", "the alias *m is not allowed"),
    ],
)
def test_bad_files(tmp_path, content, part):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        read_settings(path)
    assert part in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file():
    with pytest.raises(ConfigError, match=r"'nowhere.yaml': no such file; allowed is"):
        read_settings("nowhere.yaml")


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("/", "no such file"),
        ("/dev/zero", "no such file"),
        ("method: clasp\n" * 1000, "File name too long"),
        ("~nobody-of-this-name/clasp.yaml", "home directory"),
    ],
)
def test_what_is_no_file(path, part):
    with pytest.raises(ConfigError, match=part) as error:
        read_settings(path)
    assert len(str(error.value)) < 400


def test_a_file_of_another_user(tmp_path):
    """Root may read everything, so the test is nobody where it is root."""
    path = tmp_path / "config.yaml"
    path.write_text("method: clasp\n")
    path.chmod(0o600 if os.getuid() == 0 else 0)
    program = (
        "import locale, os, sys\n"  # what argparse imports late may not be nobody's to read
        "from clasp_vllm.cli import main\n"
        "os.setuid(65534 if os.getuid() == 0 else os.getuid())\n"
        "sys.exit(main(['check', sys.argv[1]]))"
    )
    command = [sys.executable, "-c", program, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("clasp-vllm: error: speculative configuration file")
    assert "Permission denied" in result.stderr


@pytest.mark.parametrize("key", ["num_speculative_tokens", "skip_ratio", "method", "x"])
def test_a_number_that_python_does_not_write(key):
    with pytest.raises(ConfigError, match=f"{key}=a number of too many digits"):
        parse_config({"method": "clasp", key: 1 << 40_000})


@pytest.mark.parametrize("value", ["[1]", "{bad", '{"method": '])
def test_bad_json(value):
    with pytest.raises(ConfigError, match="the JSON given"):
        read_settings(value)


def test_same_meaning_however_it_is_given(tmp_path):
    settings = {"method": "clasp", "num_speculative_tokens": 6, "skip_ratio": 0.25}
    as_yaml, as_json = tmp_path / "c.yaml", tmp_path / "c.json"
    as_yaml.write_text(yaml.safe_dump(settings))
    as_json.write_text(json.dumps(settings))
    given_ = [settings, json.dumps(settings), str(as_yaml), as_json]
    assert len({parse_config(read_settings(g)) for g in given_}) == 1
    dashed = {key.replace("_", "-"): value for key, value in settings.items()}
    assert parse_config(dashed) == parse_config(settings)


@pytest.mark.parametrize(
    ("settings", "num_layers", "budget"),
    [
        ({"method": "clasp"}, 24, 16),
        ({"method": "clasp", "adaptive": False}, 24, 12),
        ({"method": "layer_skip"}, 24, 12),
        ({"method": "clasp"}, 1, 0),
        ({"method": "clasp", "skip_ratio": 0.4}, 32, 13),
        ({"method": "clasp", "num_skipped_layers": 0}, 32, 0),
        ({"method": "layer_skip", "skip_layers": [4, 2]}, 32, 2),
        ({"method": "layer_skip", "skip_layers": []}, 32, 0),
    ],
)
def test_budget(settings, num_layers, budget):
    assert resolve(parse_config(settings), num_layers, max_num_seqs=8).budgets[-1] == budget


@pytest.mark.parametrize(
    ("settings", "budgets"),
    [
        ({"method": "clasp"}, (1, 2, 3, 4)),
        ({"method": "clasp", "num_skipped_layers": 3}, (3,)),
        ({"method": "clasp", "skip_ratio": 0.0}, (0,)),
        ({"method": "clasp", "adaptive": False}, (3,)),
        ({"method": "layer_skip", "adaptive": True}, (3,)),
    ],
)
def test_what_a_key_fixes_is_not_chosen(settings, budgets):
    assert resolve(parse_config(settings), 6, max_num_seqs=8).budgets == budgets


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ({"method": "clasp"}, CHOICES),
        ({"method": "clasp", "adaptive": False}, ()),
        ({"method": "clasp", "adaptive": ["length", "speculation"]}, ("length", "speculation")),
        ({"method": "clasp", "adaptive": []}, ()),
        (
            {"method": "clasp", "num_skipped_layers": 3, "draft_exit_threshold": 0.5},
            ("length", "speculation"),
        ),
        ({"method": "layer_skip"}, ()),
        ({"method": "layer_skip", "adaptive": True}, ("length", "exit", "speculation")),
    ],
)
def test_what_is_chosen(settings, chosen):
    assert parse_config(settings).open_choices == set(chosen)


def test_a_list_of_choices_can_be_written_in_a_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"method: clasp\nadaptive: [{', '.join(CHOICES)}]\n")
    assert parse_config(read_settings(path)).open_choices == set(CHOICES)


@pytest.mark.parametrize(
    ("settings", "max_num_seqs", "optimized", "scratch"),
    [
        ({"method": "clasp"}, 256, 4, 4 * 16),
        ({"method": "clasp"}, 2, 2, 2 * 16),  # a pass is of running requests
        ({"method": "clasp", "num_skipped_layers": 3, "max_optimized_requests": 8}, 256, 8, 8 * 3),
        ({"method": "clasp", "num_skipped_layers": 0}, 256, 4, 1),  # costs are measured in one
        ({"method": "layer_skip", "adaptive": True}, 256, 0, 1),
        ({"method": "layer_skip"}, 256, 0, 0),
    ],
)
def test_blocks_held_back(settings, max_num_seqs, optimized, scratch):
    resolved = resolve(parse_config(settings), 24, max_num_seqs)
    assert (resolved.optimized_requests, resolved.scratch_blocks) == (optimized, scratch)


def test_defaults_of_what_no_controller_chooses():
    fixed = resolve(parse_config({"method": "clasp", "adaptive": False}), 24, 8)
    assert (fixed.interval, fixed.exit_threshold, fixed.mask_memory) == (32, 0.3, 0.9)
    chosen = resolve(parse_config({"method": "clasp"}), 24, 8)
    assert (chosen.interval, chosen.exit_threshold) == (None, None)
    assert resolve(parse_config({"method": "layer_skip"}), 24, 8).mask_memory == 0


def test_it_says_what_is_chosen():
    assert explain(parse_config({"method": "clasp"}), 24) == [
        "method: clasp",
        "draft tokens per round: up to 8",
        "layers skipped: up to 16 of 24",
        "layers chosen again as often as it pays, for at most 4 requests in one step",
        "drafting stops where a further token would not pay",
        "no speculation where it does not pay",
    ]
    assert "drafting stops below a probability of 0.3" in explain(parse_config({"method": "layer_skip"}))
    fixed = parse_config({"method": "clasp", "adaptive": False, "draft_exit_threshold": 0.0})
    assert explain(fixed, 24)[1:] == [
        "draft tokens per round: 8",
        "layers skipped: 12 of 24",
        "layers chosen again every 32 rounds, for at most 4 requests in one step",
        "drafting never stops early",
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_examples_are_valid(path):
    config = parse_config(read_settings(path))
    num_layers = 80 if "70b" in path.name else 32
    assert resolve(config, num_layers, max_num_seqs=256).budgets[-1] > 0


def test_every_key_is_described():
    assert all(field.description for field in LayerSkipConfig.model_fields.values())


@pytest.mark.parametrize(
    "settings", [None, "clasp", {}, {"method": "ngram"}, {"method": "eagle", "model": "x"}]
)
def test_others_are_not_ours(settings):
    assert not is_ours(settings)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from([*LayerSkipConfig.model_fields, "x", ""]), _VALUES))
def test_any_settings_give_a_config_or_a_message(settings):
    try:
        config = parse_config({"method": "clasp", **settings})
        resolve(config, 24, max_num_seqs=8)
    except ConfigError as error:
        assert str(error)


@hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.binary(max_size=100)
    | st.text(max_size=200).map(str.encode)
    | _VALUES.map(lambda value: yaml.safe_dump(value).encode())
    | st.dictionaries(st.sampled_from([*LayerSkipConfig.model_fields, "x"]), _VALUES).map(
        lambda settings: yaml.safe_dump({"method": "clasp"} | settings).encode()
    )
)
def test_any_file_is_understood_or_gets_a_message(content):
    """Through the command: never a traceback, and one line that names the trouble."""
    import contextlib
    import io
    import tempfile

    from clasp_vllm.cli import main

    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        file.write(content)
        file.flush()
        stdout, stderr = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            status = main(["check", file.name, "--num-layers", "24"])
    if status == 0:
        assert "method: " in stdout.getvalue()
    else:
        assert status == 2
        assert stderr.getvalue().startswith("clasp-vllm: error: ")


@pytest.mark.parametrize("line", ["a{}: &a{} [{}]", "a{}: &a{} {{<<: [{}]}}"], ids=["lists", "merged keys"])
def test_a_file_that_stands_for_gigabytes(tmp_path, line):
    """Each line of it is ten times the line before."""
    lines = ["method: clasp", "a0: &a0 {x: 1}"]
    lines += [line.format(i, i, ", ".join([f"*a{i - 1}"] * 10)) for i in range(1, 12)]
    path = tmp_path / "config.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"the alias \*a0 is not allowed"):
        read_settings(path)


def test_a_file_of_a_gigabyte(tmp_path):
    """It has no bytes on the disk, and none of them is read."""
    path = tmp_path / "config.yaml"
    with open(path, "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ConfigError, match="has 1073741824 bytes; allowed are 65536 at most"):
        read_settings(path)


def test_the_documents_describe_every_key():
    from clasp_vllm.cli import key_table

    page = (ROOT / "docs" / "configuration.md").read_text()
    assert key_table() == page.split("<!-- keys -->")[1].split("<!-- /keys -->")[0].strip()
