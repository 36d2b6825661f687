"""CUDA graphs of draft steps: one for every sub-layer, so that skipping one is not replaying it.

A draft step called module by module is bound by the host: a hundred Python frames and eleven launches a
layer. Here each segment of it (the embedding with the attention metadata, every attention, every MLP, the
last norm, the head) is captured once for some batch sizes, over static buffers that all of them read and
write. Whatever sub-layers a step runs, it is a replay of theirs, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from vllm.compilation.cudagraph_pool import capture_pool
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed.parallel_state import graph_capture, is_global_first_rank
from vllm.utils.torch_utils import current_stream
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from clasp_vllm.drafting.batch import SequenceBatch
from clasp_vllm.drafting.context import CacheRows
from clasp_vllm.drafting.decoder import Decoder
from clasp_vllm.drafting.passes import Passes, run_for_some
from clasp_vllm.drafting.plans import Plan
from clasp_vllm.engine.attention import TargetAttention


class CaptureError(RuntimeError):
    """Draft steps cannot be captured, or not be replayed. Eager calls of the same have worked."""


SIZES = (1, 2, 4, 8, 16, 32, 64, 128)  # rows; larger batches draft by eager calls


@dataclass
class _Buffers:
    """What the segments of one batch size read and write.

    Attributes:
        tokens, positions: [size] int64.
        cache_positions, block_table: [size] int64 and [size, width] int32, see ``CacheRows``. Rows that are
            not used have position 0 and a table of zeros: they write to the null block, which no request
            reads.
        skips: [size, num_layers, 2] bool, of rows that skip what others run.
        delta, residual: [size, hidden_size], the pair of ``Decoder``.
        hidden: [size, hidden_size], after the last norm.
    """

    tokens: Tensor
    positions: Tensor
    cache_positions: Tensor
    block_table: Tensor
    skips: Tensor
    delta: Tensor
    residual: Tensor
    hidden: Tensor
    source: tuple[Tensor | None, Tensor | None] = None, None  # block table and masks that were copied last

    def fill(self, batch: SequenceBatch, at: CacheRows, masks: Tensor | None) -> None:
        """Copy what a step is about. ``at``: where the batch reads and writes."""
        rows = len(batch.tokens)
        self.tokens[:rows].copy_(batch.tokens)
        self.positions[:rows].copy_(batch.positions)
        self.cache_positions[:rows].copy_(at.positions)
        table, skips = self.source
        if at.block_table is not table:
            self.block_table[:rows, : at.block_table.shape[1]].copy_(at.block_table)
            self.block_table[rows:].zero_()
            self.positions[rows:].zero_()
            self.cache_positions[rows:].zero_()
        if masks is not None and masks is not skips:
            self.skips[:rows].copy_(masks)
            skips = masks
        self.source = at.block_table, skips


@dataclass
class _Size:
    """The graphs of one batch size, and what must live as long as they do."""

    buffers: _Buffers
    begin: Any = None
    run: dict[tuple[int, int], Any] = field(default_factory=dict)  # for all rows
    keep: dict[tuple[int, int], Any] = field(default_factory=dict)  # for some; the others' state is kept
    end: Any = None
    head: Any = None
    logits: Tensor | None = None
    confidence: Tensor | None = None
    context: Any = None  # the attention metadata that ``begin`` makes and every attention reads


class DraftGraphs(CudaGraphManager):
    """Captures and replays draft steps. A ``DraftRunner``.

    A ``CudaGraphManager``, for vLLM's memory profile looks for those among the attributes of a speculator.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        cudagraph_mode: CUDAGraphMode,
        decoder: Decoder,
        passes: Passes,
        attention: TargetAttention,
        num_blocks: int,
    ) -> None:
        """``num_blocks``: of the KV cache, which the comparison with eager calls may write to."""
        super().__init__(vllm_config, device, cudagraph_mode, decode_query_len=1)
        self._decoder = decoder
        self._passes = passes
        self._attention = attention
        self._num_blocks = num_blocks
        largest = min(self.max_num_reqs, SIZES[-1])
        self._sizes = [size for size in SIZES if size < largest] + [largest]
        self._captured: dict[int, _Size] = {}
        self.num_graphs = 0

    def takes(self, rows: int) -> bool:
        """See ``DraftRunner``."""
        return bool(self._captured) and rows <= self._sizes[-1]

    def draft_step(self, batch: SequenceBatch, plan: Plan) -> Tensor:
        """See ``DraftRunner``."""
        rows = len(batch.tokens)
        size = self._of(rows)
        size.buffers.fill(batch, self._passes.cache_rows(batch, plan.window), plan.masks)
        size.begin.replay()
        for layer, part, mixed in plan.steps:
            (size.keep if mixed else size.run)[layer, part].replay()
        size.end.replay()
        return size.buffers.hidden[:rows]

    def head(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See ``DraftRunner``."""
        rows = len(hidden)
        size = self._of(rows)
        if hidden.data_ptr() != size.buffers.hidden.data_ptr():
            size.buffers.hidden[:rows].copy_(hidden)
        size.head.replay()
        assert size.logits is not None
        assert size.confidence is not None
        return size.logits[:rows], size.confidence[:rows]

    def _of(self, rows: int) -> _Size:
        return self._captured[next(size for size in self._sizes if size >= rows)]

    @torch.inference_mode()
    def capture_drafts(self) -> None:
        """Capture all sizes, the largest first: the others fit into its memory."""
        with graph_capture(device=self.device):
            sizes = tqdm(
                self._sizes[::-1],
                desc="Capturing CUDA graphs (draft steps)",
                disable=not is_global_first_rank(),
            )
            for size in sizes:
                self._captured[size] = self._capture_size(size)

    def _capture_size(self, rows: int) -> _Size:
        decoder, passes = self._decoder, self._passes
        buffers = self._make_buffers(rows)
        size = _Size(buffers)
        limit = self._attention.max_model_len
        lengths = torch.full((rows,), limit, dtype=torch.int32)
        batch = SequenceBatch([], buffers.tokens, buffers.positions, buffers.block_table, lengths)
        sublayers = [(layer, part) for layer in range(decoder.num_layers) for part in (0, 1)]
        # Kernels are compiled and libraries set up by a step that is not captured. It writes nothing: with
        # tensor parallelism an all-reduce gives anything at all while others are being captured.
        plan = Plan([(layer, part, True) for layer, part in sublayers], buffers.skips)
        past_the_end = replace(batch, positions=torch.full_like(buffers.positions, limit))
        passes.head_eagerly(passes.draft_step_eagerly(past_the_end, plan))
        rotary: Tensor | None = None

        def begin() -> None:
            nonlocal rotary
            delta, residual = decoder.embed(buffers.tokens)
            buffers.delta.copy_(delta)
            buffers.residual.copy_(residual)
            rotary = buffers.positions.clamp(max=limit - 1)
            decode = self._attention.decode(buffers.cache_positions, buffers.block_table, lengths)
            size.context = rotary, context.enter_context(decode)

        def run(layer: int, part: int) -> None:
            assert rotary is not None
            delta, residual = decoder.run_sublayer(layer, part, rotary, (buffers.delta, buffers.residual))
            buffers.delta.copy_(delta)
            if residual.data_ptr() != buffers.residual.data_ptr():
                buffers.residual.copy_(residual)

        def keep(layer: int, part: int) -> None:
            assert rotary is not None
            state = buffers.delta, buffers.residual
            skip = buffers.skips[:, layer, part, None]
            delta, residual = run_for_some(decoder, layer, part, rotary, state, skip)
            buffers.delta.copy_(delta)
            buffers.residual.copy_(residual)

        def end() -> None:
            buffers.hidden.copy_(decoder.finish((buffers.delta, buffers.residual)))

        def head() -> None:
            size.logits, size.confidence = passes.head_eagerly(buffers.hidden)

        with ExitStack() as context:
            size.begin = self._record("begin", begin)
            for sublayer in sublayers:
                name = "layer {}, part {}".format(*sublayer)
                size.run[sublayer] = self._record(name, partial(run, *sublayer))
                if rows > 1:
                    size.keep[sublayer] = self._record(f"{name}, for some rows", partial(keep, *sublayer))
            size.end = self._record("end", end)
        size.head = self._record("head", head)
        return size

    def _make_buffers(self, rows: int) -> _Buffers:
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        config = self.vllm_config.model_config
        delta, residual, hidden = (zeros(rows, config.get_hidden_size(), dtype=config.dtype) for _ in "123")
        return _Buffers(
            zeros(rows, dtype=torch.int64),
            zeros(rows, dtype=torch.int64),
            zeros(rows, dtype=torch.int64),
            zeros(rows, self._attention.table_width, dtype=torch.int32),
            zeros(rows, self._decoder.num_layers, 2, dtype=torch.bool),
            delta,
            residual,
            hidden,
        )

    def _record(self, segment: str, work: Callable[[], None]) -> Any:
        """A graph of the work."""
        with _about_graphs(f"capturing a segment of draft steps ({segment})"):
            graph = torch.cuda.CUDAGraph()
            with (
                capture_pool(self.pool, self.vllm_config) as pool,
                torch.cuda.graph(graph, pool, stream=current_stream()),
            ):
                work()
        self.num_graphs += 1
        return graph

    @torch.inference_mode()
    def mismatch(self) -> str | None:
        """What replays of random steps compute other than eager calls do; None: nothing.

        Before anything is served: it writes to blocks of the cache.
        """
        generator = torch.Generator().manual_seed(0)
        # All sizes, whatever differs: with tensor parallelism a rank that stopped would keep others waiting.
        # The cache of vLLM's memory profile has too few blocks for the largest.
        rows = [size for size in self._sizes if size < self._num_blocks]
        differences = [self._compare(n, generator) for n in rows]
        return next((difference for difference in differences if difference is not None), None)

    def _compare(self, rows: int, generator: torch.Generator) -> str | None:
        batch, plan = self._random_step(rows, generator)
        eager = self._passes.draft_step_eagerly(batch, plan)
        eager_logits = self._passes.head_eagerly(eager)[0]
        with _about_graphs(f"replaying a draft step of {rows} rows"):
            states = self.draft_step(batch, plan).clone()
            logits = self.head(eager)[0]
        for name, of_eager, replayed in (("states", eager, states), ("logits", eager_logits, logits)):
            off = float((of_eager.float() - replayed.float()).norm() / of_eager.float().norm())
            if not off < (ROUNDED if self._passes.own_weights else TOLERANCE[eager.dtype]):
                return f"the {name} of {rows} rows are off by {off:.1e} (relative)"
        return None

    def _random_step(self, rows: int, generator: torch.Generator) -> tuple[SequenceBatch, Plan]:
        """A step of rows in blocks of their own, each with random layers skipped."""
        num_layers, vocabulary = self._decoder.num_layers, self.vllm_config.model_config.get_vocab_size()
        masks = torch.rand((rows, num_layers, 2), generator=generator) < 0.3
        tokens = torch.randint(vocabulary, (rows,), generator=generator)
        blocks = torch.zeros(rows, self._attention.table_width, dtype=torch.int32)
        blocks[:, 0] = torch.arange(1, rows + 1)
        positions = torch.randint(self._attention.block_size, (rows,), generator=generator)
        lengths = torch.full((rows,), self._attention.max_model_len, dtype=torch.int32)
        tokens, positions, blocks = (x.to(self.device) for x in (tokens, positions, blocks))
        return SequenceBatch([], tokens, positions, blocks, lengths), Plan.of(masks, self.device)


@contextmanager
def _about_graphs(doing: str) -> Iterator[None]:
    """Tells what fails here from what fails with eager calls too."""
    try:
        yield
    except Exception as error:
        raise CaptureError(f"{doing} failed: {error}") from error


# The kernels are the same, but for how attention splits its keys.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# Quantised products round their inputs, whatever the target's dtype: a difference that tips one over grows to
# a step of 8 bits.
ROUNDED = 5e-2
