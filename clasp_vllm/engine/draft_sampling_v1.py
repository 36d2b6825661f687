"""Model Runner V1: the tokens of drafts, and what each was drawn from."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from vllm.v1.sample.metadata import SamplingMetadata

from clasp_vllm.device import to_device
from clasp_vllm.drafting.draft import DraftOutput
from clasp_vllm.drafting.passes import finite, top_probability
from clasp_vllm.engine.requests import has_grammar

if TYPE_CHECKING:
    from clasp_vllm.engine.proposer_v1 import LayerSkipProposer


class DraftSampling:
    """Samples draft tokens for ``rows`` of a step, and keeps what the rejection sampler must know of it."""

    def __init__(
        self, proposer: LayerSkipProposer, rows: np.ndarray, num_reqs: int, metadata: SamplingMetadata
    ) -> None:
        self._proposer, self._rows, self._num_reqs, self._metadata = proposer, rows, num_reqs, metadata
        self._probs: list[Tensor] = []  # [rows sampled, vocab] each
        self._greedily = np.zeros(rows.size, dtype=bool)
        if proposer.draws and not metadata.all_greedy:
            self._greedily = self._drafted_greedily()

    def sample(
        self, hidden: Tensor, positions: Tensor, step: int, rows: np.ndarray, exact: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See ``drafting.draft.Sample``."""
        proposer = self._proposer
        logits = proposer.drafter.passes.logits(hidden, exact)
        metadata = _select_rows(self._metadata, self._rows[rows], self._num_reqs, proposer.device)
        confidence = top_probability(logits) if proposer.drafter.asks_confidence else None
        tokens, probs = proposer.draw(finite(logits) if proposer.draws else logits, metadata)
        if probs is not None:
            self._probs.append(probs)
            if self._greedily.any():
                likeliest = to_device(self._greedily[rows], proposer.device)
                tokens = torch.where(likeliest, probs.argmax(-1), tokens)
        return tokens, confidence

    @property
    def greedy(self) -> bool:
        """Whether no token was drawn."""
        return not self._probs

    def distribution(self, output: DraftOutput) -> Tensor:
        """[num_reqs, num_tokens, vocab] float32: what each draft was drawn from.

        Tokens that count as certain have all probability: they were looked up, fill up a draft stopped early,
        or are of requests drafted for greedily.
        """
        output.drawn[self._greedily] = -1
        probs, device = torch.cat(self._probs), output.tokens.device
        draft_probs = probs[to_device(output.drawn.clip(0), device)]
        certain = to_device(output.drawn < 0, device).unsqueeze(-1)
        draft_probs.masked_fill_(certain, 0.0).scatter_add_(2, output.tokens.unsqueeze(-1), certain.float())
        if len(self._rows) == self._num_reqs:
            return draft_probs
        of_all = draft_probs.new_zeros(self._num_reqs, *draft_probs.shape[1:])
        of_all[to_device(self._rows, device)] = draft_probs
        return of_all

    def _drafted_greedily(self) -> np.ndarray:
        """[rows] bool, which sampling requests are not to have drafts drawn, but the likeliest tokens.

        Those with a grammar, and those with a seed: vLLM draws drafts without regard to it.
        """
        runner = self._proposer.runner
        requests, names = runner.requests, runner.input_batch.req_ids
        grammars = [has_grammar(requests[names[row]].sampling_params) for row in self._rows]
        seeded = np.isin(self._rows, list(self._metadata.generators))
        return np.array(grammars, dtype=bool) | seeded


def _select_rows(
    metadata: SamplingMetadata, rows: np.ndarray, num_reqs: int, device: torch.device
) -> SamplingMetadata:
    """The sampling metadata of some rows, as far as drafting reads it (the temperature)."""
    if metadata.temperature is None or np.array_equal(rows, np.arange(num_reqs)):
        return metadata
    return replace(metadata, temperature=metadata.temperature[to_device(rows, device)])
