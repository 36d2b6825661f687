"""Anchors from prompts: embeddings by the engine, k-means centres, and whether the tasks lie apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clasp_vllm.policies.anchors import Anchors

MARGIN = 1.5  # times as far from a task's anchors as its farthest prompt: not of the task


def embed(model: str, prompts: Sequence[str], settings: Mapping[str, Any]) -> Tensor:
    """[prompts, hidden_size] float32: the mean over a prompt's tokens of the final hidden states.

    By vLLM's own mean pooling, in batches. ``settings``: of vllm.LLM.
    """
    from vllm import LLM
    from vllm.config import PoolerConfig
    from vllm.distributed import cleanup_dist_env_and_memory

    ours = {
        "runner": "pooling",
        "convert": "embed",
        "pooler_config": PoolerConfig(pooling_type="MEAN", use_activation=False),
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
    }
    llm = LLM(model, **{**settings, **ours})
    try:
        outputs = llm.embed(list(prompts))
        return torch.tensor([output.outputs.embedding for output in outputs], dtype=torch.float32)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def find_anchors(embeddings: Sequence[Tensor], count: int, seed: int) -> Anchors:
    """K-means centres of each task's embeddings ([prompts, hidden_size]), ``count`` or as many as prompts."""
    from sklearn.cluster import KMeans

    centres, tasks = [], []
    for task, vectors in enumerate(embeddings):
        fitted = KMeans(min(count, len(vectors)), random_state=seed, n_init=10).fit(_unit(vectors).numpy())
        centres.append(torch.from_numpy(fitted.cluster_centers_).float())
        tasks += [task] * len(fitted.cluster_centers_)
    least = [_least(embeddings, task, task_centres) for task, task_centres in enumerate(centres)]
    return Anchors(torch.cat(centres), torch.tensor(tasks), torch.tensor([least[task] for task in tasks]))


def _least(embeddings: Sequence[Tensor], task: int, centres: Tensor) -> float:
    """How near to its centres a prompt of a task has to be.

    Prompts not seen lie farther from the centres than those that made them, as far as these from each other.
    But where these have little in common, a prompt must be nearer than those of all other tasks are.
    """
    own, others = embeddings[task], [*embeddings[:task], *embeddings[task + 1 :]]
    distance = max(_distance(own, centres), _distance(own, own, itself=False))
    foreign = max((float((_unit(other) @ _unit(centres).T).max()) for other in others), default=-1.0)
    return max(1 - MARGIN * distance, min(foreign, 1 - distance))


def _distance(vectors: Tensor, others: Tensor, itself: bool = True) -> float:
    """The largest distance of a vector to the nearest other one, by cosine; 0 where there is none."""
    cosine = _unit(vectors) @ _unit(others).T
    if not itself:
        if len(vectors) < 2:
            return 0.0
        cosine.fill_diagonal_(-1.0)
    return 1 - float(cosine.max(dim=1).values.min())


def silhouette(embeddings: Sequence[Tensor]) -> float | None:
    """How far apart the tasks lie, by cosine: from -1 to 1; None for a single task."""
    from sklearn.metrics import silhouette_score

    if len(embeddings) < 2 or all(len(vectors) < 2 for vectors in embeddings):
        return None
    labels = np.repeat(np.arange(len(embeddings)), [len(vectors) for vectors in embeddings])
    return float(silhouette_score(torch.cat(list(embeddings)).numpy(), labels, metric="cosine"))


def plot(path: Path, names: Sequence[str], embeddings: Sequence[Tensor], anchors: Anchors) -> None:
    """The prompts and anchors on their first two principal components, a colour for each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from sklearn.decomposition import PCA

    plane = PCA(2).fit(torch.cat([_unit(vectors) for vectors in embeddings]).numpy())
    figure, axis = pyplot.subplots(figsize=(6, 4.5))
    for task, (name, vectors) in enumerate(zip(names, embeddings, strict=True)):
        points = plane.transform(_unit(vectors).numpy())
        centres = plane.transform(anchors.vectors[anchors.tasks == task].numpy())
        dots = axis.scatter(points[:, 0], points[:, 1], s=14, alpha=0.6, label=name)
        axis.scatter(centres[:, 0], centres[:, 1], s=90, marker="x", color=dots.get_facecolor()[0], alpha=1.0)
    explained = plane.explained_variance_ratio_
    axis.set(xlabel=f"first component ({explained[0]:.0%})", ylabel=f"second ({explained[1]:.0%})")
    axis.set_title("prompts (dots) and anchors (crosses)")
    axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=1)
