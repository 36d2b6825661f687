"""An application for Ray Serve: replicas of vLLM's own OpenAI server, each drafting for itself.

``clasp_vllm.ray_serve:build`` is what a Serve configuration file imports; see configs/ray/serve.yaml.
"""

from __future__ import annotations

import json
from contextlib import AsyncExitStack
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from clasp_vllm.config import is_ours, parse_config, read_settings


class ServerArguments(BaseModel):
    """What the Serve configuration file says of the server."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="Name or path, there on every node.")
    speculative_config: dict[str, Any] = Field(
        default={"method": "clasp"},
        description="As for vllm serve; written out, since nodes share no files. "
        "A calibration has to be at the same absolute path on all of them.",
    )
    engine_arguments: list[str] = Field(
        default=[], description="Further arguments of vllm serve, a word each: --dtype, bfloat16, ..."
    )

    def command_line(self) -> list[str]:
        """The arguments of vllm serve.

        Raises:
            ConfigError: the speculative configuration is wrong.
        """
        settings = read_settings(self.speculative_config)
        if is_ours(settings):
            parse_config(settings)
        return [self.model, *self.engine_arguments, "--speculative-config", json.dumps(settings)]


@serve.deployment
@serve.ingress()
class OpenAIServer:
    """vLLM's engine and OpenAI server in a replica."""

    def __init__(self, command_line: list[str]) -> None:
        """``command_line``: of vllm serve."""
        self._command_line = command_line
        self._running = AsyncExitStack()

    async def __serve_build_asgi_app__(self) -> Any:
        """Start the engine; the application that Serve is to run."""
        from vllm.entrypoints.cli.serve import make_arg_parser, validate_parsed_serve_args
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
        from vllm.entrypoints.launchers.app import build_app
        from vllm.plugins import load_general_plugins
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        load_general_plugins()  # ours, before anything is read
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(self._command_line)
        args.model = args.model_tag
        validate_parsed_serve_args(args)
        self._engine = await self._running.enter_async_context(build_async_engine_client(args))
        tasks = await self._engine.get_supported_tasks()
        app = build_app(args, tasks, self._engine.model_config)
        await init_app_state(self._engine, app.state, args, tasks)
        return app

    async def __del__(self) -> None:
        await self._running.aclose()

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        await self._engine.check_health()


def build(args: dict[str, Any]) -> serve.Application:
    """The application of a Serve configuration file; ``args``: those of ``ServerArguments``.

    Raises:
        ConfigError, pydantic.ValidationError: an argument is wrong; the message names it.
    """
    application: serve.Application = OpenAIServer.bind(  # type: ignore[attr-defined]
        ServerArguments(**args).command_line()
    )
    return application
