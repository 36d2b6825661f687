"""Lets vLLM do on a CPU what it keeps for GPUs: Model Runner V2, and Ray.

A test harness, never product code. Python imports this module at start-up in every process whose
PYTHONPATH holds this folder (the engine core and the workers too).

V2: Triton's kernels are interpreted. vLLM takes Triton to be there only if a backend with an active driver
is, so it is given one; TRITON_INTERPRET=1 does the rest. Masks that a kernel makes of integers are taken for
what they are on a GPU, which the interpreter would refuse, and log1p, of which it has none, is made of log.

Ray: vLLM's executors refuse the CPU only because the platform names no resource of Ray's to ask for. With
VLLM_CLASP_TEST_RAY=1 it asks for "GPU", of which the test's nodes are said to have some.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    from types import SimpleNamespace

    from triton import language
    from triton.backends import backends
    from triton.language.extra import libdevice
    from triton.runtime.interpreter import InterpreterBuilder

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    libdevice.log1p = lambda x: language.log(1.0 + x)

    def flags(mask):
        mask.data = mask.data.astype(bool)
        return mask

    InterpreterBuilder.create_masked_load = lambda self, pointers, mask, *args, **kwargs: load(
        self, pointers, flags(mask), *args, **kwargs
    )
    InterpreterBuilder.create_masked_store = lambda self, pointers, value, mask, *args: store(
        self, pointers, value, flags(mask), *args
    )

if os.environ.get("VLLM_CLASP_TEST_RAY") == "1":
    import importlib.util
    import sys
    from importlib.abc import MetaPathFinder

    class NameTheResource(MetaPathFinder):
        """Sets ``CpuPlatform.ray_device_key`` when its module is imported."""

        def find_spec(self, name, path, target=None):
            if name != "vllm.platforms.cpu":
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            original = spec.loader.exec_module

            def exec_module(module):
                original(module)
                module.CpuPlatform.ray_device_key = "GPU"

            spec.loader.exec_module = exec_module
            return spec

    sys.meta_path.insert(0, NameTheResource())
