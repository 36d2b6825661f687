"""How the plugin enters vLLM: the same configuration by every way, nothing for others."""

import json
import os
import sys

import pytest
from engines import DEMO_MODEL, PROMPTS, engine_process, generate, model_runner, running


def build_configs(tmp: str) -> dict[str, str]:
    """The engine's SpeculativeConfig by every way of giving the same settings."""
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    path = os.path.join(tmp, "clasp.yaml")
    settings = {"method": "clasp", "num_speculative_tokens": 6, "num_skipped_layers": 7}
    with open(path, "w") as file:
        json.dump(settings, file)

    def config(args: EngineArgs) -> str:
        speculative_config = args.create_engine_config().speculative_config
        assert speculative_config.method == "draft_model"
        assert speculative_config.draft_model_config is speculative_config.target_model_config
        return repr(speculative_config.layer_skip)

    def cli(args_class, *arguments: str) -> str:
        parser = args_class.add_cli_args(FlexibleArgumentParser())
        args = parser.parse_args(["--model", str(DEMO_MODEL), *arguments])
        return config(args_class.from_cli_args(args))

    short = {key: value for key, value in settings.items() if key == "num_skipped_layers"}
    return {
        "serve, file": cli(AsyncEngineArgs, "--speculative-config", path),
        "serve, JSON": cli(AsyncEngineArgs, "--speculative-config", json.dumps(settings)),
        "bench, file": cli(EngineArgs, "-sc", path),
        "spec flags": cli(EngineArgs, "-sc", json.dumps(short | {"method": "clasp"}), "--spec-tokens", "6"),
        "LLM, dict": config(EngineArgs(model=str(DEMO_MODEL), speculative_config=dict(settings))),
        "LLM, file": config(EngineArgs(model=str(DEMO_MODEL), speculative_config=path)),
    }


@pytest.fixture(scope="module")
def call():
    with engine_process("v1") as call:
        yield call


def test_every_way_means_the_same(call, tmp_path):
    configs = call(build_configs, str(tmp_path))
    assert len(set(configs.values())) == 1, configs
    assert "num_speculative_tokens=6" in configs["LLM, dict"]


NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 2}


def untouched(speculative_config: object) -> dict:
    """An engine that does not use us: what it generates and what of ours it has loaded."""
    with running(speculative_config=speculative_config) as llm:
        outcome = generate(llm, PROMPTS[:4])
        core = llm.llm_engine.engine_core.engine_core
        return {
            "outcome": outcome,
            "config": type(llm.llm_engine.vllm_config.speculative_config).__module__,
            "drafter": type(getattr(model_runner(llm), "drafter", None)).__module__,
            "blocks": core.scheduler.kv_cache_manager.block_pool.num_gpu_blocks,
            "ours": sorted(m for m in sys.modules if m.startswith("clasp_vllm.")),
        }


@pytest.mark.parametrize(
    "speculative_config", [None, pytest.param(NGRAM, marks=pytest.mark.slow)], ids=["plain", "ngram"]
)
def test_engines_that_do_not_use_us_are_untouched(speculative_config, monkeypatch):
    with engine_process("v1") as call:
        installed = call(untouched, speculative_config)
    monkeypatch.setenv("VLLM_PLUGINS", "none")
    with engine_process("v1") as call:
        without = call(untouched, speculative_config)
    assert without.pop("ours") == []
    # The entry point and the hooks are there; nothing that drafts, and no runner hook, was loaded.
    assert installed.pop("ours") == [
        "clasp_vllm.config",
        "clasp_vllm.config.parsing",
        "clasp_vllm.config.resolved",
        "clasp_vllm.config.schema",
        "clasp_vllm.engine",
        "clasp_vllm.engine.hooks",
        "clasp_vllm.plugin",
    ]
    assert installed == without


def register_with_a_changed_vllm() -> str:
    """register() in a vLLM that has lost what a hook wraps."""
    from vllm.engine.arg_utils import EngineArgs

    from clasp_vllm.plugin import register

    del EngineArgs.create_speculative_config
    register()
    register()
    return "still here"


def test_register_never_raises():
    with engine_process("v1") as call:
        assert call(register_with_a_changed_vllm) == "still here"


def hooks_installed_twice() -> int:
    """How many layers of wrapping a hook has after registering three times."""
    from vllm.engine.arg_utils import EngineArgs

    from clasp_vllm.plugin import register

    for _ in range(3):
        register()
    function, depth = EngineArgs.create_speculative_config, 0
    while hasattr(function, "_clasp_vllm_original"):
        function, depth = function._clasp_vllm_original, depth + 1
    return depth


def test_register_is_reentrant():
    with engine_process("v1") as call:
        assert call(hooks_installed_twice) == 1
