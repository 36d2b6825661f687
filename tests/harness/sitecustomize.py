"""Lets Model Runner V2 run where there is no GPU: Triton's kernels are interpreted on the CPU.

A test harness, never product code. Python imports this module at start-up in every process whose
PYTHONPATH holds this folder (the engine core and the workers too). vLLM takes Triton to be there
only if a backend with an active driver is, so it is given one; TRITON_INTERPRET=1 does the rest.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    from types import SimpleNamespace

    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
