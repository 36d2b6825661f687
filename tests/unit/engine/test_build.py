"""What the scheduler is told of the KV cache."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor

from clasp_vllm.config import ConfigError
from clasp_vllm.engine import build


@pytest.fixture
def hold_back(monkeypatch):
    monkeypatch.setattr(build, "draft_settings", lambda vllm_config: SimpleNamespace(scratch_blocks=7))
    monkeypatch.setattr(build, "update_kv_cache_capacity", lambda *_: None)

    def hold_back(num_blocks: int) -> tuple[KVCacheConfig, SimpleNamespace]:
        spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float32)
        page = spec.page_size_bytes
        tensor = KVCacheTensor(2 * page * num_blocks, ["a", "b"], page * num_blocks, page)
        config = KVCacheConfig(num_blocks, [tensor], [KVCacheGroupSpec(["a", "b"], spec)])
        vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=64), cache_config=SimpleNamespace(num_gpu_blocks=None)
        )
        build.hold_back_scratch_blocks(vllm_config, config)
        return config, vllm_config

    return hold_back


def test_blocks_are_held_back_and_as_large_as_the_workers(hold_back):
    """Connectors in the scheduler work out the size of a block from that of all of them."""
    before = 30
    config, vllm_config = hold_back(before)
    spec = config.kv_cache_groups[0].kv_cache_spec
    assert config.num_blocks == vllm_config.cache_config.num_gpu_blocks == before - 7
    assert config.kv_cache_tensors[0].size / config.num_blocks == 2 * spec.page_size_bytes
    assert config.kv_cache_tensors[0].layer_stride == spec.page_size_bytes * before  # as it is allocated


def test_the_longest_context_leaves_room_for_scratch(hold_back, monkeypatch):
    """With --max-model-len auto vLLM takes as long a context as the cache holds."""
    monkeypatch.setattr(build, "draft_settings", lambda vllm_config: SimpleNamespace(scratch_blocks=7))
    config, _ = hold_back(12)
    groups = config.kv_cache_groups
    page = 2 * groups[0].kv_cache_spec.page_size_bytes
    assert build.without_scratch(None, [groups, []], [12 * page, 12 * page]) == [5 * page, 12 * page]


def test_too_few_blocks(hold_back):
    hold_back(5 + 7)
    with pytest.raises(ConfigError, match="a request of 64 tokens needs 5"):
        hold_back(4 + 7)
