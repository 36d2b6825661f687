"""Two tensor-parallel ranks, each a process of its own: same output, same masks, no hang if they disagree."""

import logging
import time
from pathlib import Path

import pytest
from engines import PROMPTS, REPEATING, drafter_of, generate, masks_of, running, two_ranks

pytestmark = pytest.mark.both_cores

CLASP = {
    "method": "clasp",
    "adaptive": False,
    "num_speculative_tokens": 4,
    "optimization_interval": 2,
    "draft_exit_threshold": 0.3,
}


def disagree(worker) -> None:
    """Make rank 1 find masks of its own."""
    from dataclasses import replace

    if worker.rank == 1:
        ours = drafter_of(worker)
        original = ours.policy.run_programme

        def run_programme(batch, prior, window):
            programme, hidden = original(batch, prior, window)
            other = replace(programme, margins=programme.margins.roll(3, dims=0))
            ours.disagreements += int((other.mask(12) != programme.mask(12)).any())
            return other, hidden

        ours.policy.run_programme, ours.disagreements = run_programme, 0


def disagreements_of(worker) -> int:
    """How many passes gave this rank another mask."""
    return getattr(drafter_of(worker), "disagreements", 0)


def goes_without_graphs(worker) -> bool:
    """Whether this rank drops its graphs of draft steps, when those of rank 1 compute something else."""
    from types import SimpleNamespace

    from clasp_vllm.engine.speculator_v2 import LayerSkipSpeculator

    mismatch = "the states are off" if worker.rank == 1 else None
    graphs = SimpleNamespace(capture_drafts=lambda: None, mismatch=lambda: mismatch)
    ours = SimpleNamespace(graphs=graphs)
    LayerSkipSpeculator.capture(ours)
    return ours.graphs is None


def parallel(speculative_config: object, forced: bool = False, tokens: int = 24) -> tuple:
    settings = {"tensor_parallel_size": 2, "kv_cache_memory_bytes": 256 << 20, "block_size": 32}
    with running(speculative_config=speculative_config, **settings) as llm:
        if forced:
            llm.collective_rpc(disagree)
        outcome = generate(llm, [*PROMPTS[:5], REPEATING], max_tokens=tokens)
        if not speculative_config:
            return outcome, None
        if forced:
            assert llm.collective_rpc(disagreements_of)[1] > 0
            assert llm.collective_rpc(goes_without_graphs) == [True, True]
        return outcome, llm.collective_rpc(masks_of)


@pytest.mark.parametrize("runner", ["v1", pytest.param("v2", marks=pytest.mark.slow)])
def test_ranks_agree(runner, monkeypatch):
    with two_ranks(runner, monkeypatch) as call:
        plain, _ = call(parallel, None)
        clasp, masks = call(parallel, CLASP)
        forced, forced_masks = call(parallel, CLASP, True)
    assert clasp.token_ids == plain.token_ids
    assert masks[0] == masks[1]
    assert clasp.num_accepted_tokens > 0
    # Rank 0 overrules: the same masks, and so the same drafts, as without the disagreement.
    assert forced_masks[0] == forced_masks[1] == masks[0]
    assert forced == clasp


def watch(worker) -> None:
    """Keep what this rank chooses. Rank 0 sees drafts that cost little, rank 1 drafts that never pay.

    N-grams seem good to both.
    """
    controller = drafter_of(worker).controller
    original = controller.choose
    controller.chosen = []
    controller.evidence.ngrams.mean[:] = 4.0
    controller.rank_sync.scales["draft_scale"][:] = 0.01  # as rank 0 shares it from its first pass on

    def choose(*args):
        controller.corrections.scales["draft_scale"][:] = 50.0 if worker.rank else 0.01
        choice = original(*args)
        controller.chosen.append((choice.length, choice.ngram, choice.budget))
        return choice

    controller.choose = choose


def chosen_by(worker) -> list[tuple]:
    return drafter_of(worker).controller.chosen


def adaptive(speculative_config: object) -> tuple:
    settings = {"tensor_parallel_size": 2, "kv_cache_memory_bytes": 256 << 20, "max_num_seqs": 8}
    with running(speculative_config=speculative_config, **settings) as llm:
        if speculative_config:
            llm.collective_rpc(watch)
        outcome = generate(llm, [*PROMPTS[:5], REPEATING], max_tokens=24)
        return outcome, llm.collective_rpc(chosen_by) if speculative_config else None


@pytest.mark.parametrize("runner", ["v1", pytest.param("v2", marks=pytest.mark.slow)])
def test_ranks_choose_alike(runner, monkeypatch):
    with two_ranks(runner, monkeypatch) as call:
        plain, _ = call(adaptive, None)
        clasp, chosen = call(adaptive, CLASP | {"adaptive": True, "ngram_cascade": True})
    assert clasp.token_ids == plain.token_ids
    assert chosen[0] == chosen[1]
    assert any(length for length, *_ in chosen[0])
    assert any(ngram for _, ngram, *_ in chosen[0])


@pytest.mark.slow
@pytest.mark.parametrize("draft", [{"draft_weights": "int8"}, {"draft_context": 1}])
def test_other_drafts(draft, monkeypatch):
    """Each rank quantises its shard; and all cut the context alike."""
    with two_ranks("v1", monkeypatch) as call:
        plain, _ = call(parallel, None)
        clasp, masks = call(parallel, CLASP | draft)
    assert clasp.token_ids == plain.token_ids
    assert masks[0] == masks[1]
    assert clasp.num_accepted_tokens > 0


class SabotageError(RuntimeError):
    """Raised in the middle of drafting."""


def fail_on(worker, rank: int, log: Path) -> None:
    """From now on drafts fail on one rank, and what our part of it logs is kept."""
    if worker.rank == rank:

        def run_sublayer(*args):
            raise SabotageError("in the middle of a draft")

        logging.getLogger("vllm.clasp_vllm.engine.build").addHandler(logging.FileHandler(log))
        drafter_of(worker).decoder.run_sublayer = run_sublayer


def until_a_rank_fails(rank: int, log: Path) -> tuple[str, list[int | None]]:
    """The error that ends the engine, and the ranks' exit codes."""
    settings = {"tensor_parallel_size": 2, "kv_cache_memory_bytes": 256 << 20, "block_size": 32}
    with running(speculative_config=CLASP, **settings) as llm:
        generate(llm, PROMPTS[:2], max_tokens=8)
        llm.collective_rpc(fail_on, args=(rank, log))
        started = time.monotonic()
        with pytest.raises(Exception) as error:  # noqa: PT011 - whatever it is: the test reads it
            generate(llm, PROMPTS[:2], max_tokens=8)
        print(f"\nrank {rank} failed, and {time.monotonic() - started:.1f} s later: {error.value}")
        executor = llm.llm_engine.engine_core.engine_core.model_executor
        executor.shutdown()
        return f"{error.type.__name__}: {error.value}", [worker.proc.exitcode for worker in executor.workers]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("runner", ["v1", pytest.param("v2", marks=pytest.mark.slow)])
def test_a_drafter_that_fails_on_one_rank_ends_the_engine(runner, rank, monkeypatch, tmp_path):
    """At once: the other rank waits in a collective, and so would vLLM for it, up to a limit of its own."""
    monkeypatch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "100")
    log = tmp_path / "log"
    with two_ranks(runner, monkeypatch) as call:
        error, exit_codes = call(until_a_rank_fails, rank, log)
    assert not error.startswith("TimeoutError"), error
    if rank == 0:
        assert "in the middle of a draft" in error
        return
    assert exit_codes[1] == 1
    (message, *traceback) = log.read_text().splitlines()
    assert message == "Layer skipping failed on rank 1 of 2. The others wait for it, so the engine ends."
    assert "SabotageError: in the middle of a draft" in traceback[-1]
