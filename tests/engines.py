"""Real vLLM engines for tests, each in a process of its own kind of runner.

``engine_process("v1")`` or ``("v2")`` gives a function that runs another function, by name, in a new
process with that model runner, forked from one that has imported vLLM. Inside it ``running(...)`` starts an
engine; several may follow one another there. V2 runs under Triton's interpreter (see tests/harness).
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DEMO_MODEL = ROOT / "scripts" / "demo" / "model"

_COMMON = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that a test can look inside
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
_V2 = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "TRITON_INTERPRET": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "harness"), str(ROOT / "tests")]),
}

# One request of each of the demo model's domains, and odd shapes.
PROMPTS = [
    "Question: Natalia sold clips to 48 of her friends in April, and then she sold half as many clips "
    "in May. How many clips did Natalia sell altogether in April and May?\nAnswer:",
    "Question: A box holds 12 pens. How many pens are in 7 boxes?\nAnswer:",
    "Question: John runs 3 miles a day for a week. How far does he run?\nAnswer: He runs",
    "def parse(self, text):\n    ",
    "class Reader(io.IOBase):\n    def __init__(self,",
    "import os\nimport sys\n\n\ndef main(argv):\n",
    "Mr. Bennet was so odd a mixture of",
    '"My dear Holmes," said I,',
    "Fellow citizens of the Senate and House of Representatives:",
    "Alice was beginning to",
    "Question: List the name and age of the top 5 users by score.\nSQL:",
    "Question: How many trips have a amount less than 987?\nSQL:",
    "Question: What is the average age of items for each year?\nSQL:",
    "Text: Eve is a 64 year old baker who lives in Delhi.\nJSON:",
    "Text: Leo is a 31 year old pilot who lives in Oslo.\nJSON:",
    "a",
]
# Of structured output.
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
REPEATING = "a = 1, b = 2, c = 3, d = 4; " * 4


def tiny_llama(folder: Path, seed: int = 0, kind: str = "llama", **settings: Any) -> Path:
    """A random Llama, or another of its family, of six layers with the demo model's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind,
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.12,  # with less the output is one token repeated
        bos_token_id=0,
        eos_token_id=1,
        **settings,
    )
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_MODEL / name, folder / name)
    return folder


@cache
def _fork_server(runner: str) -> forkserver.ForkServer:
    """One for each runner, for what vLLM imports depends on it."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload(["preload"])
    path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), path])
    server.ensure_running()  # with the environment as it is now
    os.environ["PYTHONPATH"] = path
    return server


def _set_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


@contextmanager
def engine_process(runner: str, forked: bool = True) -> Iterator[Callable[..., Any]]:
    """``call(function, *args, **kwargs)`` runs a module-level function in a process of that runner.

    ``forked``: else it imports vLLM itself, in the environment as it is.
    """
    before = dict(os.environ)
    if runner != "v2":  # another process with V2 may be alive
        for key in [key for key in _V2 if os.environ.get(key) == _V2[key]]:
            del os.environ[key]
    os.environ.update(_COMMON | (_V2 if runner == "v2" else {}))
    if forked:
        forkserver.connect_to_new_process = _fork_server(runner).connect_to_new_process
    context = multiprocessing.get_context("forkserver" if forked else "spawn")
    try:
        with ProcessPoolExecutor(1, context, _set_environment, (dict(os.environ),)) as pool:
            yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result(600)
    finally:
        _set_environment(before)


def two_ranks(runner: str, monkeypatch: Any) -> Any:
    """An ``engine_process`` of which each rank has a core of its own."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))
    if runner == "v2":
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    return engine_process(runner)


@contextmanager
def running(
    model: str | Path = DEMO_MODEL, speculative_config: object = None, **settings: Any
) -> Iterator[Any]:
    """An engine in this process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 512 << 20,
        "max_model_len": 512,
        "max_num_seqs": 32,
        "disable_log_stats": False,
    }
    llm = LLM(str(model), speculative_config=speculative_config, **(defaults | settings))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def force_async_scheduling() -> None:
    """Switch async scheduling on in this process, which vLLM switches off on CPUs."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls, vllm_config):
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


@dataclass
class Outcome:
    """What an engine generated, and vLLM's own counters of speculation."""

    token_ids: list[list[int]]
    texts: list[str]
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_position: tuple[int, ...] = ()


def generate(
    llm: Any, prompts: Sequence[Any], lora_request: list[Any] | None = None, **sampling: Any
) -> Outcome:
    """Generate for all prompts at once."""
    from vllm import SamplingParams

    params = SamplingParams(**({"temperature": 0.0, "max_tokens": 64, "ignore_eos": True} | sampling))
    before = _counters(llm)
    outputs = llm.generate(list(prompts), params, use_tqdm=False, lora_request=lora_request)
    after = _counters(llm)
    per_position = tuple(a - b for a, b in zip(after.pop("per_pos"), before.pop("per_pos"), strict=True))
    return Outcome(
        [list(completion.token_ids) for output in outputs for completion in output.outputs],
        [completion.text for output in outputs for completion in output.outputs],
        **{key: after[key] - before[key] for key in after},
        accepted_per_position=per_position,
    )


def _counters(llm: Any) -> dict[str, Any]:
    metrics = {metric.name.removeprefix("vllm:spec_decode_"): metric for metric in llm.get_metrics()}
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    counters = {name: int(metrics[name].value) if name in metrics else 0 for name in names}
    vector = metrics.get("num_accepted_tokens_per_pos")
    counters["per_pos"] = tuple(vector.values) if vector else ()
    return counters


def model_runner(llm: Any) -> Any:
    """The model runner of the engine's only worker."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def change_costs(llm: Any, every: int = 6) -> list[tuple[bool, Any]]:
    """Make drafts seem to cost nothing for a few rounds, then more than they could be worth, and so on.

    Every second time that they cost nothing, skipping much seems as good as skipping little. Returns a list
    that grows with what the controller chooses: (whether drafts were dear, the choice).
    """
    import clasp_vllm.control.gate as module
    from clasp_vllm.control.costs import PassCosts

    module.OFF_CHECK = 1  # it thinks in every round, though speculation is off
    chosen: list[tuple[bool, Any]] = []
    controller = drafter(llm).controller
    # What passes and drafts really cost on this machine is another question.
    controller.gate.affords = lambda *_: True
    controller.costs = PassCosts((1.0, 512.0), (1e-3, 1e-3), (0.0, 0.0))
    controller.corrections.settle = lambda: None
    for name in ("plain_scale", "verify_scale"):
        controller.corrections.scales[name][:] = 1.0
    original = controller.choose

    def choose(*args: Any) -> Any:
        turn, evidence = len(chosen) // every % 4, controller.evidence
        dear, curve = turn % 2 == 1, evidence._curve
        controller.corrections.scales["draft_scale"][:] = 1e6 if dear else 1e-6
        if turn == 2:
            evidence._curve = curve * 0 + 0.9
        choice = original(*args)
        evidence._curve = curve
        chosen.append((dear, choice))
        return choice

    controller.choose = choose
    return chosen


def look_up(llm: Any, how: str) -> list[bool]:
    """Make drafts from the context seem best: alone ("as they are"), or "beside" drafts by skipping for the
    requests without any.

    Returns a list that will hold of each round of drafts whether both kinds were in it.
    """
    ours, both = drafter(llm), []
    controller, draft = ours.controller, ours.draft
    controller.gate.affords = lambda *_: True

    def counted(*args: Any) -> Any:
        total = ours.statistics.total
        ngrams, rounds = total.ngrams, total.rounds
        drafted = draft(*args)
        both.append(total.ngrams > ngrams and total.rounds > rounds)
        return drafted

    ours.draft = counted
    controller.evidence.ngrams.mean[:] = 4.0
    controller.rank_sync.scales["draft_scale"][:] = 1e9 if how == "as they are" else 1e-6
    controller.corrections.settle = lambda: None
    if how == "beside":  # and so it stays
        controller.evidence.drafts.mean[:] = -2.0
        controller.evidence.add_verified = controller.evidence.add_ngrams = lambda *args: None
    return both


def drafter(llm: Any) -> Any:
    """Our drafter, whichever the runner."""
    return _drafter(model_runner(llm))


def drafter_of(worker: Any) -> Any:
    """Our drafter on the worker's rank."""
    return _drafter(worker.model_runner)


def masks_of(worker: Any) -> list[Any]:
    """Every sequence's mask on the worker's rank."""
    return drafter_of(worker).sequences.masks.int().tolist()


def _drafter(runner: Any) -> Any:
    return (runner.speculator if hasattr(runner, "speculator") else runner.drafter).drafter
