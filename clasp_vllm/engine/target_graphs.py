"""Full CUDA graphs of the target for every batch and every draft length, with Model Runner V2.

A full graph takes batches in which each request has the same number of tokens, the graph's own: one more
than its drafts. The controller changes the draft length while serving, so each length needs graphs. vLLM
would capture as many for each as for one alone, and would look for a batch's graph only among those of the
next captured token count: where that belongs to another length, the batch gets none.
"""

# ruff: noqa: SLF001 - a manager's graphs to capture and to choose from have no public names

from __future__ import annotations

from collections import Counter

from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager

from clasp_vllm.control.planner import draft_lengths
from clasp_vllm.engine.build import draft_settings


def cover_draft_lengths(manager: ModelCudaGraphManager) -> None:
    """Have a new manager capture and find a full graph for every batch that may be scheduled.

    Steps without drafts keep all of vLLM's sizes. Those with drafts share among all lengths as many graphs
    as vLLM captures for one length: a batch is padded by some 50 to 100 tokens at most. With LoRA vLLM's
    graphs are left as they are: each is there for several numbers of adapters.
    """
    if manager.vllm_config.lora_config is not None:
        return
    lengths = scheduled_lengths(manager.vllm_config)
    mode, longest = manager.cudagraph_mode, manager.compilation_config.max_cudagraph_capture_size
    graphs = manager._capture_descs.get(CUDAGraphMode.FULL, [])
    if len(lengths) < 2 or not mode.separate_routine() or not graphs or not longest:
        return
    most = min(manager.max_num_reqs, longest)
    sizes = {size for size in manager.compilation_config.cudagraph_capture_sizes or () if size <= most}
    counts = {0: sorted(sizes | {most})}
    # Off its stride are sizes that vLLM adds for drafts: plain decoding alone would not have them.
    added = sum(size % (8 if size < 256 else 16) > 0 for size in counts[0] if size > 4)
    most_of_one = max(Counter(graph.uniform_token_count for graph in graphs).values())
    share = (most_of_one - added) // (len(lengths) - 1)
    for length in lengths[1:]:
        counts[length] = spread(min(manager.max_num_reqs, longest // (1 + length)), share)
    by_length = [[_graph(requests, length) for requests in counts[length]] for length in lengths]
    every = [graph for graphs in by_length for graph in graphs]
    manager._capture_descs[CUDAGraphMode.FULL] = sorted(every, key=lambda graph: -graph.num_tokens)
    for tokens in range(1, longest + 1):
        smallest = (next((g for g in graphs if g.num_tokens >= tokens), None) for graphs in by_length)
        others = [g for g in manager._candidates.get((tokens, 0), ()) if g.cg_mode != CUDAGraphMode.FULL]
        manager._candidates[tokens, 0] = [graph for graph in smallest if graph is not None] + others


def scheduled_lengths(vllm_config: VllmConfig) -> list[int]:
    """The draft lengths that the scheduler may be asked for, none first; nothing where there is only one."""
    config, settings = vllm_config.speculative_config, draft_settings(vllm_config)
    longest, table = settings.num_speculative_tokens, config.num_speculative_tokens_per_batch_size
    if vllm_config.parallel_config.data_parallel_size > 1 or not (settings.adaptive or table):
        return []
    chosen = [longest]
    if settings.adaptive:
        chosen = draft_lengths(longest) if "length" in settings.open_choices else [0, longest]
    limits = {longest}
    if table:
        most = vllm_config.scheduler_config.max_num_seqs
        limits = set(build_dynamic_sd_schedule_lookup(table, most, longest)[1:])
    return sorted({0, *(min(length, limit) for length in chosen for limit in limits)})


def spread(most: int, count: int) -> list[int]:
    """Some ``count`` numbers of requests to capture graphs for, the last of them ``most``.

    They are evenly spaced, for a small batch pads for next to nothing: it is bound by reading the weights.
    Below the first come 1, 4, 16 and so on, also where that makes them more.
    """
    if most < 1:
        return []
    chosen: set[int] = set()
    for parts in range(max(count, 1), 0, -1):
        even = {-(-most * part // parts) for part in range(1, parts + 1)}
        chosen = even | {4**i for i in range(most.bit_length()) if 4**i < min(even)}
        if len(chosen) <= count:
            break
    return sorted(chosen)


def _graph(requests: int, length: int) -> BatchExecutionDescriptor:
    each = 1 + length
    return BatchExecutionDescriptor(CUDAGraphMode.FULL, requests * each, requests, uniform_token_count=each)
