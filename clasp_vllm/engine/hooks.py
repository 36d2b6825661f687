"""Every place where the plugin changes vLLM. What each hook is for, and when it goes, is listed in
``docs/developer/hooks.md``.

A hook wraps one function, leaves it as it is for configurations that are not ours, and can be installed any
number of times. ``install`` sets those of this file in every process when vLLM loads its plugins; a worker's
hooks (``runner_hooks``) follow where it uses us, so that others never import our engine.
"""

from __future__ import annotations

import functools
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from clasp_vllm.config import METHODS, ConfigError, is_ours, parse_config, read_settings

SUPPORTED = ("0.32", "0.33")  # and every patch of them
_INSTALLED = "_clasp_vllm_original"


def wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace ``owner.name`` by ``make(original)``, once.

    Raises:
        AttributeError: vLLM has no such function.
    """
    original = getattr(owner, name)
    if hasattr(original, _INSTALLED):
        return
    wrapper = functools.wraps(original)(make(original))
    setattr(wrapper, _INSTALLED, original)
    static = isinstance(vars(owner).get(name), staticmethod)
    setattr(owner, name, staticmethod(wrapper) if static else wrapper)


def uses_us(vllm_config: Any) -> bool:
    """Whether one of our methods drafts."""
    return getattr(vllm_config.speculative_config, "layer_skip", None) is not None


def check_version() -> None:
    """Raises ConfigError when the installed vLLM is not one of the supported versions."""
    import vllm

    if not vllm.__version__.startswith(tuple(f"{version}." for version in SUPPORTED)):
        raise ConfigError(
            f"clasp_vllm supports vLLM {' and '.join(SUPPORTED)}, but vLLM {vllm.__version__} is installed. "
            "Install one of those, or use a speculative method of vLLM's own."
        )


def install() -> None:
    """Install the hooks that every process needs."""
    from vllm.engine.arg_utils import EngineArgs

    wrap(EngineArgs, "add_cli_args", _cli_argument)
    wrap(EngineArgs, "create_speculative_config", _speculative_config)
    try:
        check_version()
    except ConfigError:
        return  # the configuration hook says so if one of our methods is asked for
    import vllm.v1.core.kv_cache_utils as kv_cache_utils
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.worker.worker_base import WorkerBase

    wrap(SamplingParams, "_validate_spec_decode", _request_parameters)
    wrap(kv_cache_utils, "_auto_fit_max_model_len", _auto_fit)
    wrap(EngineCore, "_initialize_kv_caches", _scratch_blocks)
    wrap(WorkerBase, "__init__", _worker)
    wrap(StatLoggerManager, "__init__", _stat_loggers)
    wrap(Scheduler, "schedule", _placeholders)
    wrap(Scheduler, "update_from_output", _update_from_output)
    wrap(EngineCore, "post_step", _post_step)


def _cli_argument(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        action = parser._option_string_actions.get("--speculative-config")  # noqa: SLF001 - argparse has no other
        if action is None:
            return parser
        action.type = parse_cli_argument
        action.help = (
            f"{action.help or ''} With clasp_vllm also the path of a YAML or JSON file, and the "
            f"methods {', '.join(METHODS)}; see `clasp-vllm keys`."
        )
        return parser

    return add_cli_args


class CommandLineSettings(dict[str, Any]):
    """Settings from the command line, where an error is a message and not a traceback."""


def parse_cli_argument(value: str) -> CommandLineSettings | None:
    """The argparse type of --speculative-config: JSON or the path of a file."""
    if value in ("", "None"):
        return None
    try:
        settings = read_settings(value)
        if is_ours(settings):
            check_version()
            parse_config(settings)
    except ConfigError as error:
        raise ArgumentTypeError(str(error)) from None
    return CommandLineSettings(settings)


def _speculative_config(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_speculative_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from_command_line = isinstance(self.speculative_config, CommandLineSettings)
        try:
            settings = self.speculative_config
            if isinstance(settings, str | Path):
                settings = self.speculative_config = read_settings(settings)
            if self.spec_method is not None:
                settings = {**(settings or {}), "method": self.spec_method}
            if is_ours(settings):
                check_version()
                from clasp_vllm.engine.translate import speculative_config

                return speculative_config(self, *args, **kwargs)
            if settings is not None:
                _check_method(settings.get("method"))
        except ConfigError as error:
            if from_command_line:
                sys.exit(f"vllm: error: {error}")
            raise
        return original(self, *args, **kwargs)

    return create_speculative_config


def _check_method(method: object) -> None:
    from vllm.config.speculative import SpeculativeMethod

    allowed = (*METHODS, *get_args(SpeculativeMethod))
    if method is not None and method not in allowed and method != "[ngram]":
        raise ConfigError(f"method={method!r} is not known; allowed are {', '.join(allowed)}")


def _request_parameters(original: Callable[..., Any]) -> Callable[..., Any]:
    def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
        if getattr(speculative_config, "layer_skip", None) is None:
            return original(self, speculative_config)
        from clasp_vllm.engine.requests import check_extra_args, check_logprobs

        # min_p and logit_bias, which vLLM refuses here, are applied to drafts too.
        sharded = speculative_config.target_parallel_config.enable_batch_sharded_sampling
        check_logprobs(self, speculative_config.target_model_config.logprobs_mode, sharded)
        return check_extra_args(self.extra_args)

    return _validate_spec_decode


def _auto_fit(original: Callable[..., Any]) -> Callable[..., Any]:
    def _auto_fit_max_model_len(vllm_config: Any, groups_by_worker: Any, memory_by_worker: Any) -> None:
        if uses_us(vllm_config):
            from clasp_vllm.engine.build import without_scratch

            memory_by_worker = without_scratch(vllm_config, groups_by_worker, memory_by_worker)
        original(vllm_config, groups_by_worker, memory_by_worker)

    return _auto_fit_max_model_len


def _scratch_blocks(original: Callable[..., Any]) -> Callable[..., Any]:
    def _initialize_kv_caches(self: Any, vllm_config: Any) -> Any:
        scheduler_kv_cache_config = original(self, vllm_config)
        if uses_us(vllm_config):
            from clasp_vllm.engine.build import hold_back_scratch_blocks

            hold_back_scratch_blocks(vllm_config, scheduler_kv_cache_config)
        return scheduler_kv_cache_config

    return _initialize_kv_caches


def _worker(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        if uses_us(vllm_config):
            from clasp_vllm.engine.runner_hooks import install_draft_weights, install_runner_hooks

            install_runner_hooks(vllm_config.use_v2_model_runner)
            if vllm_config.speculative_config.layer_skip.quantises:
                install_draft_weights()
            wrap(type(self), "compile_or_warm_up_model", _warm_up)
            wrap(type(self), "reload_weights", _new_weights)
            wrap(type(self), "finish_weight_update", _new_weights)
        original(self, vllm_config, *args, **kwargs)

    return __init__


def _warm_up(original: Callable[..., Any]) -> Callable[..., Any]:
    def compile_or_warm_up_model(self: Any) -> Any:
        if not uses_us(self.vllm_config):
            return original(self)
        from clasp_vllm.engine.steps import engine_steps

        drafter = drafter_of(self.model_runner)
        # Before vLLM locks its workspace, to which Marlin's locks are added by its first product on a stream.
        drafter.passes.try_out(self.device)
        times = original(self)
        drafter.start(self.device, engine_steps(self.model_runner))
        return times

    return compile_or_warm_up_model


def _new_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    def change_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if uses_us(self.vllm_config):
            drafter_of(self.model_runner).forget()

    return change_weights


def drafter_of(runner: Any) -> Any:
    """The drafter of a model runner that uses us."""
    return (runner.speculator if hasattr(runner, "speculator") else runner.drafter).drafter


def _placeholders(original: Callable[..., Any]) -> Callable[..., Any]:
    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        if uses_us(self.vllm_config):
            from clasp_vllm.engine.metrics import count_by_request, pad_no_requests
            from clasp_vllm.engine.requests import declines_drafts

            pad_no_requests(self)
            count_by_request(self)
            for request in self.running:
                if request.spec_token_ids and declines_drafts(request.sampling_params):
                    request.spec_token_ids = []
        return original(self, *args, **kwargs)

    return schedule


def _update_from_output(original: Callable[..., Any]) -> Callable[..., Any]:
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        if not uses_us(self.vllm_config):
            return original(self, scheduler_output, model_runner_output)
        from clasp_vllm.engine.metrics import schedule_requested_length, send_acceptance, take_drafts

        schedule_requested_length(self, model_runner_output)
        take_drafts(self, model_runner_output)
        outputs = original(self, scheduler_output, model_runner_output)
        send_acceptance(self, outputs)
        return outputs

    return update_from_output


def _post_step(original: Callable[..., Any]) -> Callable[..., Any]:
    def post_step(self: Any, model_executed: bool) -> None:
        drafts = vars(self.scheduler).pop("layer_skip_drafts", None)
        if drafts is None:
            original(self, model_executed)
        elif drafts.req_ids:
            self.scheduler.update_draft_token_ids(drafts)

    return post_step


def _stat_loggers(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if uses_us(vllm_config):
            from clasp_vllm.engine.metrics import LayerSkipStatLogger

            self.stat_loggers.insert(0, LayerSkipStatLogger(vllm_config, self.engine_indexes))

    return __init__
