"""What every engine process needs, imported once: in the process that they are forked from (engines.py)."""

import gc
import warnings

import vllm.entrypoints.llm
import vllm.model_executor.models.llama
import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker  # noqa: F401
from vllm.model_executor.models import registry

# vLLM looks at a model's class in a process of its own, for that may start CUDA: 20 s for each class.
registry._run_in_subprocess = lambda look: look()

for category in (DeprecationWarning, FutureWarning):  # as in pyproject.toml
    warnings.filterwarnings("error", category=category, module=r"clasp_vllm(\.|\Z)")

gc.collect()
gc.freeze()  # so that no engine's collections go through it again
