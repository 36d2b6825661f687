"""The prediction for GPUs: a script that needs none, and says that it is one."""

import importlib.util
import re
import subprocess
import sys

import pytest
from engines import ROOT

from clasp_vllm.tools import cost_model


def test_prints_a_prediction():
    result = subprocess.run(
        [sys.executable, "scripts/bench/predict.py", "--overhead", "0"],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    assert "**Not measured.**" in result.stdout
    assert "Llama-3-8B" in result.stdout
    assert "Llama-3-70B" in result.stdout
    ratios = [float(text) for text in re.findall(r"to ([0-9]\.[0-9]+) \(", result.stdout)]
    assert len(ratios) > 100
    assert all(1.05 <= ratio < 4 for ratio in ratios)


@pytest.fixture(scope="module")
def predict():
    spec = importlib.util.spec_from_file_location("predict", ROOT / "scripts" / "bench" / "predict.py")
    module = sys.modules["predict"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["predict"]


def parts(predict, draft: int, requests: int = 1, number: int = 1, model: int = 0, context: int = 1_000):
    machine = predict.Machine(predict.GPUS[1], number, 0.8, 8e-6, 0.08, 2e-4)
    return predict.costs(predict.MODELS[model], machine, predict.DRAFTS[draft], requests, context)


def test_chosen_layers_cost_optimisation_passes(predict):
    """As the controller has them: a fiftieth of the time."""
    of_skipping, of_fp8 = parts(predict, 0), parts(predict, 1)
    assert of_skipping.optimize > of_skipping.step[0]
    assert of_fp8.optimize is None
    without = cost_model.best_ratio(of_skipping, 0.9, 16, predict.LONGEST)[0]
    assert 0.95 * without < predict.best_ratio(of_skipping, 0.9, 16)[0] < 0.99 * without


def test_a_head_at_8_bits_is_priced_as_that(predict):
    """Under int4 layers too, where operations bound it."""
    assert parts(predict, 3, 256).head == parts(predict, 1, 256).head < 0.6 * parts(predict, 0, 256).head


def test_what_to_set_is_what_the_tables_say(predict):
    """int4 for 8B on one GPU; on eight skipping alone promises as much."""
    for number, ahead in ((1, True), (8, False)):
        skipping = predict.best_ratio(parts(predict, 0, 1, number), 0.9, 16)[0]
        int4 = predict.best_ratio(parts(predict, 3, 1, number), 0.94, 32)[0]
        assert (int4 > skipping) == ahead


@pytest.mark.parametrize(("model", "number", "requests"), [(0, 1, 2), (0, 4, 2), (1, 4, 4), (1, 8, 4)])
def test_windows_are_ahead_at_long_contexts(predict, model, number, requests):
    def best(draft: int, alpha: float) -> float:
        layers = predict.MODELS[model].layers
        of_batch = parts(predict, draft, requests, number, model, 32_000)
        return predict.best_ratio(of_batch, alpha, layers)[0]

    for end in (0, 1):
        alone, cut = (predict.DRAFTS[draft].acceptance[end] for draft in (3, 5))
        assert best(5, cut) > best(3, alone)
