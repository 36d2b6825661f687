"""KV connectors for machines without a GPU: classes that vLLM loads by their names."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class CopyingSpec(CPUOffloadingSpec):
    """vLLM's offloading to host memory, with a worker that copies between tensors on the CPU: vLLM's asks for
    streams of a GPU. What is stored, loaded and evicted, and when, is vLLM's."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        tensors = kv_caches.tensors
        return CopyingWorker(
            kv_caches, [t.tensor.new_zeros(self.num_chunks, t.tensor.shape[1]) for t in tensors]
        )


class CopyingTiersSpec(TieringOffloadingSpec):
    """Likewise, of host memory in front of files."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        shared = SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=0,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        sizes = [entry.page_size_bytes for entry in kv_caches.tensors]
        return CopyingWorker(kv_caches, [shared.create_next_worker_view(size) for size in sizes])


class CopyingWorker(OffloadingWorker):
    """Copies when it is asked to. ``stored`` is what lies on the host, one tensor for each of the cache's."""

    def __init__(self, kv_caches: CanonicalKVCaches, stored: list[torch.Tensor]) -> None:
        self.cache = [entry.tensor for entry in kv_caches.tensors]
        self.stored = stored
        self.finished: list[TransferResult] = []
        self.num_loads = 0

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        assert isinstance(dst_spec, CPULoadStoreSpec)
        for cache, stored in zip(self.cache, self.stored, strict=True):
            stored[torch.from_numpy(dst_spec.block_ids)] = cache[torch.from_numpy(src_spec.block_ids)]
        self.finished.append(TransferResult(job_id, success=True))
        return True

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        assert isinstance(src_spec, CPULoadStoreSpec)
        self.num_loads += len(dst_spec.block_ids)
        for cache, stored in zip(self.cache, self.stored, strict=True):
            cache[torch.from_numpy(dst_spec.block_ids)] = stored[torch.from_numpy(src_spec.block_ids)]
        self.finished.append(TransferResult(job_id, success=True))
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self.finished = self.finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """They are done."""


class CountingConnector(ExampleConnector):
    """Counts how often attention layers offer it their cache to be stored."""

    saved: ClassVar[Counter[str]] = Counter()

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        self.saved[layer_name] += 1
        super().save_kv_layer(layer_name, kv_layer, attn_metadata, **kwargs)
