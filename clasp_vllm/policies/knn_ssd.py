"""KNN-SSD: the anchor nearest to a prompt says which sub-layers its request skips once it is decoded."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clasp_vllm.device import HostCopy
from clasp_vllm.drafting.batch import PromptTokens
from clasp_vllm.drafting.policy import Policy
from clasp_vllm.drafting.sequences import SequenceTable
from clasp_vllm.policies.anchors import Anchors


class KnnSsd(Policy):
    """Matches prompts with anchors. A prompt's mask is its task's for the whole request.

    The embedding is summed up over the chunks of a prefill. Tokens that come from the prefix cache have
    no hidden states, so the mean is over those that the request computes itself.
    """

    reads_prompts = True

    def __init__(
        self,
        sequences: SequenceTable,
        anchors: Anchors,
        masks: Tensor,
        names: Sequence[str],
        share: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        """
        Args:
            anchors: of all tasks but the last.
            masks: [tasks, num_layers, 2] bool, True = skipped. The last is for prompts of no task known.
            names: [tasks] of the tasks.
            share: makes what was matched the same on all ranks that run the layers together.
        """
        self._sequences = sequences
        self._anchors = anchors
        self._masks = masks.unsqueeze(1)  # one budget
        self._names = names
        self._tasks: Counter[str] = Counter()
        self._share = share
        # Of prompts not read to the end: sum of embeddings, how many, and where the next token is.
        self._sums: OrderedDict[str, tuple[Tensor, int, int]] = OrderedDict()
        # On a GPU a match is used from the next round, like CLaSp's masks: the host does not wait for it.
        self._matched: list[tuple[Sequence[str], HostCopy]] = []
        self._late: list[tuple[Sequence[str], HostCopy]] = []

    def reset(self) -> None:
        """See ``Policy``."""
        self._sums.clear()
        self._matched.clear()
        self._late.clear()

    def read(self, prompts: PromptTokens) -> None:
        """See ``Policy``."""
        ended, embeddings = [], []
        for request_id, start, hidden, last in prompts:
            before, length, end = self._sums.pop(request_id, (0.0, 0, start))
            if end != start:  # it was preempted and begins again
                before, length = 0.0, 0
            total, length = before + hidden.float().sum(0), length + len(hidden)
            if last:
                ended.append(request_id)
                embeddings.append(total / length)
                continue
            self._sums[request_id] = total, length, start + len(hidden)
            if len(self._sums) > self._sequences.capacity:  # of a request that was aborted
                self._sums.popitem(last=False)
        if ended:
            self._anchors = self._anchors.to(embeddings[0].device)
            tasks, _ = self._anchors.match(torch.stack(embeddings))
            self._matched.append((ended, HostCopy(self._share(tasks))))

    def apply(self) -> None:
        """See ``Policy``."""
        matched, self._matched = self._matched, []
        if self._anchors.vectors.device.type != "cpu":
            matched, self._late = self._late, matched
        for request_ids, matched_tasks in matched:
            tasks = matched_tasks.get() % len(self._masks)  # -1 is the last
            self._sequences.set_masks(request_ids, self._masks[tasks])
            self._tasks.update(self._names[task] for task in tasks.tolist())

    def take_tasks(self) -> dict[str, int]:
        """See ``Policy``."""
        tasks, self._tasks = self._tasks, Counter()
        return dict(tasks)
