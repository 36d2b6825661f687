"""What measuring commands reach into: an engine in their own process."""

from __future__ import annotations

import os
from typing import Any


def stay_in_process() -> None:
    """Have vLLM run its engine in this process. To be called before vLLM is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def model_runner(llm: Any) -> Any:
    """The model runner of a ``vllm.LLM``.

    Raises:
        SystemExit: it has several ranks, which are in processes of their own.
    """
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    if not hasattr(executor, "driver_worker"):
        raise SystemExit("clasp-vllm: error: this works with one rank only, without --tensor-parallel-size")
    return executor.driver_worker.worker.model_runner


def proposer(llm: Any) -> Any:
    """What drafts in a ``vllm.LLM``, ours or vLLM's, or None."""
    runner = model_runner(llm)
    return getattr(runner, "speculator", None) or getattr(runner, "drafter", None)


def drafter(llm: Any) -> Any:
    """Our ``Drafter`` in a ``vllm.LLM``, or None."""
    return getattr(proposer(llm), "drafter", None)
