"""KNN-SSD in the engine: lossless with masks of sub-layers, and every domain gets its own anchors."""

import subprocess
import sys

import pytest
import torch
from engines import (
    DEMO_MODEL,
    PROMPTS,
    drafter,
    drafter_of,
    engine_process,
    generate,
    masks_of,
    running,
    tiny_llama,
    two_ranks,
)

from clasp_vllm.tools.prompts import HELD_OUT, TASKS, task_prompts

ENGINE = ["--dtype=float32", "--enforce-eager", "--max-model-len=512", "--kv-cache-memory-bytes=67108864"]
FOREIGN = [
    "Der schnelle braune Fuchs springt über den faulen Hund und läuft davon.",
    "0x7f 0x45 0x4c 0x46 02 01 01 00 00 00",
    "今日はとても良い天気ですね。散歩に行きましょう。",
]
LONG = "Here is some text that all requests begin with, long enough to fill a block of the cache. " * 9


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> dict:
    """A calibration of the demo model's five domains, by hardly any search."""
    path = tmp_path_factory.mktemp("calibration")
    command = [sys.executable, "-m", "clasp_vllm.cli", "calibrate", str(DEMO_MODEL), f"--output={path}"]
    options = ["--trials=4", "--max-tokens=6", "--search-prompts=2"]
    subprocess.run([*command, *options, "--", *ENGINE], check=True, timeout=500, capture_output=True)
    return {
        "method": "knn_ssd",
        "calibration": str(path),
        "num_speculative_tokens": 4,
        "ngram_cascade": False,
    }


def served(speculative_config: object, prompts: list[str], tokens: int) -> tuple:
    """What was generated, and the masks that were used, of attention and MLP."""
    with running(speculative_config=speculative_config, max_num_seqs=8) as llm:
        outcome = generate(llm, prompts, max_tokens=tokens)
        masks = drafter(llm).sequences.masks[:, 0] if speculative_config else None
        return outcome, None if masks is None else masks.unique(dim=0).tolist()


@pytest.mark.parametrize(
    ("runner", "count", "tokens"), [("v1", 16, 32), pytest.param("v2", 6, 12, marks=pytest.mark.slow)]
)
def test_lossless_with_masks_of_sublayers(runner, count, tokens, config):
    with engine_process(runner) as call:
        plain, _ = call(served, None, PROMPTS[-count:], tokens)
        knn_ssd, masks = call(served, config | {"adaptive": False}, PROMPTS[-count:], tokens)
    assert knn_ssd.token_ids == plain.token_ids
    assert knn_ssd.num_accepted_tokens > 0
    assert len(masks) > 1
    assert any(attention != mlp for mask in masks for attention, mlp in mask)


def mismatch(worker) -> None:
    """Have rank 1 take every prompt for another task, and count that it does."""
    policy = drafter_of(worker).policy
    policy.mismatches = 0
    if worker.rank == 1:
        share = policy._share

        def other(tasks):
            shared = share((tasks + 1) % len(policy._masks))
            policy.mismatches += int((shared == tasks).sum())
            return shared

        policy._share = other


def mismatches_of(worker) -> int:
    """Prompts for which this rank was told another task than it would have shared, and the one it found."""
    return drafter_of(worker).policy.mismatches


def on_two_ranks(speculative_config: object, prompts: list[str]) -> tuple:
    settings = {"tensor_parallel_size": 2, "kv_cache_memory_bytes": 256 << 20, "max_num_seqs": 8}
    with running(speculative_config=speculative_config, **settings) as llm:
        if speculative_config:
            llm.collective_rpc(mismatch)
        outcome = generate(llm, prompts, max_tokens=24)
        if not speculative_config:
            return outcome, None, None
        return outcome, llm.collective_rpc(masks_of), llm.collective_rpc(mismatches_of)


@pytest.mark.slow
def test_tensor_parallel_ranks_skip_alike(config, monkeypatch):
    """Even if they take prompts for different tasks: what rank 0 finds holds."""
    prompts = [prompt for task in TASKS for prompt in task_prompts(task)[:1]]
    with two_ranks("v1", monkeypatch) as call:
        plain, *_ = call(on_two_ranks, None, prompts)
        knn_ssd, masks, mismatches = call(on_two_ranks, config | {"adaptive": False}, prompts)
    assert mismatches == [0, len(prompts)]
    assert knn_ssd.token_ids == plain.token_ids
    assert knn_ssd.num_accepted_tokens > 0
    assert masks[0] == masks[1]
    assert len({str(mask) for mask in masks[0]}) > 1


def tasks_by_prompt(config: dict, prompts: list[str], **settings) -> list[tuple[int, list[float], int]]:
    """The task that each prompt is taken for, its embedding, and of how many tokens. One by one."""
    by_prompt, lengths = [], []
    with running(speculative_config=config, max_num_seqs=2, **settings) as llm:
        policy = drafter(llm).policy
        anchors = policy._anchors

        class Spy:
            vectors = anchors.vectors

            def to(self, device):
                return self

            def match(self, embeddings):
                tasks, cosine = anchors.match(embeddings)
                by_prompt.append((int(tasks[0]), embeddings[0].tolist()))
                return tasks, cosine

        policy._anchors = Spy()
        read = policy.read

        def count(chunks):
            lengths.append(sum(len(hidden) for _, _, hidden, _ in chunks))
            read(chunks)

        policy.read = count
        for i, prompt in enumerate(prompts):
            lengths.clear()
            generate(llm, [prompt], max_tokens=3)
            by_prompt[i] = *by_prompt[i], sum(lengths)
        metrics = [m for m in llm.get_metrics() if m.name == "vllm:layer_skip_prompts"]
        assert sum(metric.value for metric in metrics) == len(prompts)
    return by_prompt


def test_a_prompt_of_each_domain_gets_its_own_anchor_and_a_foreign_one_none(config):
    prompts = [prompt for task in TASKS for prompt in task_prompts(task)[:HELD_OUT]]
    with engine_process("v1") as call:
        tasks = [task for task, *_ in call(tasks_by_prompt, config, prompts + FOREIGN)]
    tasks, foreign = tasks[: len(prompts)], tasks[len(prompts) :]
    right = [task == i // HELD_OUT for i, task in enumerate(tasks)]
    assert sum(right) >= len(right) - 2, tasks
    assert foreign == [-1] * len(FOREIGN)
    for domain in range(len(TASKS)):
        assert any(right[domain * HELD_OUT : (domain + 1) * HELD_OUT])


def test_chunks_and_cached_prefixes(config):
    """In chunks: the same embedding. With a cached prefix: that of the rest of the prompt."""
    prompts = [LONG + task_prompts(task)[0] for task in TASKS[:3]]
    with engine_process("v1") as call:
        whole = call(tasks_by_prompt, config, prompts, enable_prefix_caching=False)
        chunks = call(
            tasks_by_prompt, config, prompts, enable_prefix_caching=False, max_num_batched_tokens=32
        )
        cached = call(tasks_by_prompt, config, prompts, enable_prefix_caching=True)
    for (task, embedding, length), (same_task, same, same_length) in zip(whole, chunks, strict=True):
        assert (task, length) == (same_task, same_length)
        assert same == pytest.approx(embedding, abs=1e-3)
    assert cached[0][1] == pytest.approx(whole[0][1], abs=1e-3)  # nothing was cached yet
    # What is missing of the sums is the prefix's, the same for both.
    missing = []
    for (_, embedding, length), (_, rest, left) in zip(whole[1:], cached[1:], strict=True):
        assert 0 < left < length
        missing.append((length - left, length * torch.tensor(embedding) - left * torch.tensor(rest)))
    (tokens, one), (same_tokens, other) = missing
    assert tokens == same_tokens
    torch.testing.assert_close(one / tokens, other / tokens, atol=1e-3, rtol=0)


def refused(model: str, config: dict) -> str:
    from clasp_vllm.config import ConfigError

    with pytest.raises(ConfigError) as error, running(model, config):
        pass
    return str(error.value)


def test_a_calibration_of_another_model_is_refused(config, tmp_path):
    with engine_process("v1") as call:
        folder = call(tiny_llama, tmp_path)
        assert "24 layers of width 192; this one has 6 of 64" in call(refused, str(folder), config)
