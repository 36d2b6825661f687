"""KV connectors store what plain vLLM's would, and what they load is gone on from as in plain vLLM."""

from __future__ import annotations

import pytest
from engines import PROMPTS, engine_process, generate, running

pytestmark = pytest.mark.slow

CLASP = {"method": "clasp", "adaptive": False, "num_speculative_tokens": 5, "optimization_interval": 2}
OFFLOADING = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "spec_name": "CopyingSpec",
        "spec_module_path": "kv_connectors",
        "cpu_bytes_to_use": 256 << 20,
        "offload_prompt_only": False,  # or what drafts come near is never stored
    },
}
COUNTING = {
    "kv_connector": "CountingConnector",
    "kv_connector_module_path": "kv_connectors",
    "kv_role": "kv_both",
}


def offloaded(speculative_config: object, connector: dict | None) -> tuple[list, dict[bytes, list], int]:
    """The answers of two turns, the second with no cache but what was offloaded; a sample of each block that
    was, by its hash; and how many were loaded."""
    import torch
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    words = {} if connector is None else {"kv_transfer_config": connector}
    with running(speculative_config=speculative_config, block_size=32, **words) as llm:
        turns, prompts = [], [llm.get_tokenizer().encode(prompt) for prompt in PROMPTS]
        for _ in range(2):
            turns.append(
                generate(llm, [{"prompt_token_ids": ids} for ids in prompts], max_tokens=100).token_ids
            )
            prompts = [ids + answer for ids, answer in zip(prompts, turns[-1], strict=True)]
            generate(llm, ["a"], max_tokens=3)  # steps in which what has finished is stored
            assert llm.reset_prefix_cache()
        if connector is None:
            return turns, {}, 0
        worker = get_kv_transfer_group().connector_worker.worker
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        chunks = scheduler.connector.connector_scheduler.manager._policy.chunks
        numbers = torch.cat([stored.view(torch.float32) for stored in worker.stored], 1)[:, ::61]
        blocks = {bytes(key): numbers[chunk.chunk_id].tolist() for key, chunk in chunks.items()}
        return turns, blocks, worker.num_loads


@pytest.fixture
def call(monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # for hashes of blocks that can be compared
    with engine_process("v1") as call:
        yield call


def test_offloading(call):
    """Blocks are stored when their tokens are verified: no draft's key or value is among them."""
    expected, _, _ = call(offloaded, None, None)
    turns, theirs, loads = call(offloaded, None, OFFLOADING)
    assert turns == expected
    assert loads > 0
    turns, ours, our_loads = call(offloaded, CLASP, OFFLOADING)
    assert turns == expected
    assert our_loads == loads
    assert ours.keys() == theirs.keys()
    assert len(ours) > len(PROMPTS)
    for key, numbers in theirs.items():
        assert ours[key] == pytest.approx(numbers, abs=1e-3)


def handed_over(speculative_config: object, folder: str) -> tuple[list, int, dict[str, int]]:
    """The answers, how many drafts were accepted, and how often each layer offered its cache to be stored."""
    import kv_connectors

    kv_connectors.CountingConnector.saved.clear()
    connector = COUNTING | {"kv_connector_extra_config": {"shared_storage_path": folder}}
    with running(speculative_config=speculative_config, kv_transfer_config=connector) as llm:
        outcome = generate(llm, PROMPTS, max_tokens=32)
        return outcome.token_ids, outcome.num_accepted_tokens, dict(kv_connectors.CountingConnector.saved)


def test_drafts_are_not_handed_to_a_connector(call, tmp_path):
    """Connectors that store layer by layer take each layer once in a step."""
    expected, _, plain = call(handed_over, None, str(tmp_path / "plain"))
    got, accepted, ours = call(handed_over, CLASP, str(tmp_path / "ours"))
    assert got == expected
    assert accepted > 0
    assert len(plain) == len(ours) == 24
    assert len(set(plain.values())) == len(set(ours.values())) == 1
    assert min(ours.values()) < min(plain.values())
