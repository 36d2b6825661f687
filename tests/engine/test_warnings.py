"""In engine processes too, what our own code calls and is deprecated is an error."""

import warnings

from engines import engine_process


def raised(module: str) -> bool:
    try:
        warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, module)
    except DeprecationWarning:
        return True
    return False


def test_ours_are_errors():
    with engine_process("v1") as call:
        assert call(raised, "clasp_vllm.engine.graphs")
        assert not call(raised, "torch")
