"""What our own code calls and is deprecated is an error in tests; what others call is not our affair."""

import warnings

import pytest


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_ours_are_errors(category):
    for module in ("clasp_vllm", "clasp_vllm.engine.graphs"):
        with pytest.raises(category):
            warnings.warn_explicit("old", category, "file.py", 1, module)
    for module in ("clasp_vllm_other", "torch.clasp_vllm"):
        warnings.warn_explicit("old", category, "file.py", 1, module)
