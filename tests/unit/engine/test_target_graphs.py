"""With Model Runner V2 on a GPU every batch finds a full graph of the target, however long its drafts are.

vLLM's own manager decides that, in pure Python: here it is as it is, on a configuration that holds only what
it reads. Graphs are counted and looked up, none is captured.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from engines import DEMO_MODEL

FULL_GRAPHS = 512  # tokens of the largest that vLLM captures by default


@pytest.fixture
def graphs(monkeypatch):
    """``graphs(max_num_seqs, settings)``: the manager of the target's graphs, as if these were captured.

    ``settings``: our configuration; a number for vLLM's own speculation of so many tokens; None for none.
    """
    import torch
    import vllm.v1.worker.gpu.cudagraph_utils as module
    from vllm.config import VllmConfig
    from vllm.config.compilation import CUDAGraphMode
    from vllm.platforms import current_platform

    from clasp_vllm.engine.runner_hooks import install_runner_hooks

    install_runner_hooks(v2=True)
    only_rank = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(module, "get_pp_group", lambda: only_rank)
    monkeypatch.setattr(type(current_platform), "get_global_graph_pool", lambda self: None)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")

    def make(max_num_seqs, settings, mode=CUDAGraphMode.FULL_AND_PIECEWISE):
        speculative = speculative_config(settings) if isinstance(settings, dict) else None
        if isinstance(settings, int):
            speculative = SimpleNamespace(uses_dynamic_speculative_decoding=lambda: False)
        longest = settings if isinstance(settings, int) else getattr(speculative, "num_speculative_tokens", 0)
        config = SimpleNamespace(
            model_config=SimpleNamespace(enforce_eager=False, get_total_num_hidden_layers=lambda: 24),
            scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=8192),
            parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1),
            cache_config=SimpleNamespace(use_kda_recoverssm=False),
            lora_config=None,
            compilation_config=SimpleNamespace(
                cudagraph_mode=mode,
                max_cudagraph_capture_size=None,
                cudagraph_capture_sizes=None,
                post_init_cudagraph_sizes=lambda: None,
            ),
            performance_mode="balanced",
            speculative_config=speculative,
            num_speculative_tokens=longest,
            uniform_decode_query_len=1 + longest,
        )
        VllmConfig._set_cudagraph_sizes(config)
        manager = module.ModelCudaGraphManager(config, torch.device("cpu"), mode, 1 + longest)
        manager._graphs_captured = True
        return manager

    return make


def speculative_config(settings):
    """What our configuration gives vLLM on a GPU."""
    from vllm.config import ParallelConfig
    from vllm.engine.arg_utils import EngineArgs

    from clasp_vllm.engine.translate import speculative_config

    arguments = EngineArgs(str(DEMO_MODEL), speculative_config={"method": "clasp"} | settings)
    return speculative_config(arguments, arguments.create_model_config(), ParallelConfig())


def full(manager):
    from vllm.config.compilation import CUDAGraphMode

    return manager._capture_descs.get(CUDAGraphMode.FULL, [])


def without_graph(manager, length, batches):
    """Of these batches, in which every request has ``length`` draft tokens, those without a full graph."""
    from vllm.config.compilation import CUDAGraphMode

    each, missing = 1 + length, []
    for requests in batches:
        found = manager.dispatch(requests, requests * each, each, 0, max_query_len=each)
        if found.cg_mode != CUDAGraphMode.FULL:
            missing.append(requests)
        else:
            assert found in full(manager)
            assert found.num_reqs >= requests
            assert found.num_tokens == found.num_reqs * each
    return missing


@pytest.mark.parametrize("max_num_seqs", [16, 20, 256, 1024])
@pytest.mark.parametrize("longest", [1, 5, 8])
def test_every_batch_finds_a_full_graph(graphs, max_num_seqs, longest):
    from clasp_vllm.control.planner import draft_lengths

    ours = graphs(max_num_seqs, {"num_speculative_tokens": longest})
    missing = {}
    for length in draft_lengths(longest):
        most = min(max_num_seqs, FULL_GRAPHS // (1 + length))
        missing[length] = without_graph(ours, length, range(1, most + 1))
    assert missing == {length: [] for length in draft_lengths(longest)}


@pytest.mark.parametrize("max_num_seqs", [16, 20, 256, 1024])
@pytest.mark.parametrize("longest", [1, 5, 8])
def test_graphs_are_no_more_than_for_one_length_and_plain_decoding(graphs, max_num_seqs, longest):
    ours = full(graphs(max_num_seqs, {"num_speculative_tokens": longest}))
    plain, fixed = full(graphs(max_num_seqs, None)), full(graphs(max_num_seqs, longest))
    print(
        f"\n{max_num_seqs} requests, up to {longest} draft tokens: {len(ours)} full graphs; vLLM for plain "
        f"decoding {len(plain)}, for {longest} draft tokens alone {len(fixed)}"
    )
    few = 2 if max_num_seqs < 32 else 0  # of so few graphs each length keeps three or four
    assert len(set(ours)) == len(ours) <= len(plain) + len(fixed) + few


def test_plain_steps_have_the_graphs_of_plain_vllm(graphs):
    ours = full(graphs(256, {"num_speculative_tokens": 8}))
    assert set(full(graphs(256, None))) <= set(ours)


def test_batches_are_padded_by_little(graphs):
    """By at most 80 tokens, which a step that is bound by reading the weights hardly notices."""
    ours = graphs(256, {"num_speculative_tokens": 8})
    for length in (1, 2, 4, 8):
        each = 1 + length
        for requests in range(1, min(256, FULL_GRAPHS // each) + 1):
            found = ours.dispatch(requests, requests * each, each, 0, max_query_len=each)
            assert found.num_tokens - requests * each <= 80


def test_batches_that_differ_within_go_as_they_did(graphs):
    """A batch with a prefill, or with drafts of several lengths, is for piecewise graphs, or for none."""
    from vllm.config.compilation import CUDAGraphMode

    ours, plain = graphs(256, {"num_speculative_tokens": 8}), graphs(256, None)
    for tokens in (1, 13, 100, 512, 600):
        found = ours.dispatch(5, tokens, None, 0)
        assert found.cg_mode == plain.dispatch(5, tokens, None, 0).cg_mode
        assert (found.cg_mode == CUDAGraphMode.NONE) == (tokens > FULL_GRAPHS)
        assert found.num_tokens >= tokens


def test_a_table_of_the_users_limits_the_lengths(graphs):
    table = [[1, 8, 6], [9, 256, 3]]
    settings = {"num_speculative_tokens": 8, "num_speculative_tokens_per_batch_size": table}
    ours = graphs(256, settings)
    assert {graph.uniform_token_count for graph in full(ours)} == {1, 2, 3, 4, 5, 7}
    for length in (0, 1, 2, 3, 4, 6):
        assert without_graph(ours, length, range(1, min(256, FULL_GRAPHS // (1 + length)) + 1)) == []


@pytest.mark.parametrize("settings", [{"adaptive": False, "num_speculative_tokens": 5}, 5, None])
def test_what_has_one_length_is_left_alone(graphs, settings):
    longest = 0 if settings is None else 5
    ours, stock = graphs(64, settings), graphs(64, longest or None)
    assert ours._capture_descs == stock._capture_descs
    assert ours._candidates == stock._candidates


def test_without_full_graphs_nothing_changes(graphs):
    from vllm.config.compilation import CUDAGraphMode

    settings = {"num_speculative_tokens": 5}
    assert full(graphs(64, settings, CUDAGraphMode.PIECEWISE)) == []
    mixed = full(graphs(64, settings, CUDAGraphMode.FULL))  # each takes any batch
    assert {graph.uniform_token_count for graph in mixed} == {None}
