"""Anchors: scikit-learn's centres, and a threshold that knows its own prompts."""

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score

from clasp_vllm.calibration.anchors import find_anchors, plot, silhouette


def blobs(spread: float = 0.1) -> list[torch.Tensor]:
    """Three tasks around directions of their own."""
    generator = torch.Generator().manual_seed(0)
    return [torch.eye(8)[task] + spread * torch.randn(20, 8, generator=generator) for task in range(3)]


def test_centres_are_those_of_k_means_on_unit_vectors():
    anchors = find_anchors(blobs(), count=4, seed=3)
    assert anchors.tasks.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    unit = torch.nn.functional.normalize(blobs()[1], dim=1).numpy()
    expected = KMeans(4, random_state=3, n_init=10).fit(unit).cluster_centers_
    torch.testing.assert_close(anchors.vectors[anchors.tasks == 1], torch.from_numpy(expected).float())


def test_own_prompts_are_matched_and_foreign_ones_are_not():
    anchors = find_anchors(blobs(), count=4, seed=0)
    for task, prompts in enumerate(blobs()):
        assert (anchors.match(prompts)[0] == task).all()
    assert anchors.match(-torch.ones(1, 8))[0].item() == -1


def test_fewer_prompts_than_anchors():
    anchors = find_anchors([torch.eye(4)[:2], torch.eye(4)[2:3]], count=10, seed=0)
    assert anchors.tasks.tolist() == [0, 0, 1]


def test_whether_the_tasks_lie_apart(tmp_path):
    near, far = blobs(0.6), blobs(0.05)
    labels = [0] * 20 + [1] * 20 + [2] * 20
    expected = silhouette_score(torch.cat(far).numpy(), labels, metric="cosine")
    assert silhouette(far) == pytest.approx(expected)
    assert silhouette(far) > 0.8 > silhouette(near)
    assert silhouette(far[:1]) is None
    plot(tmp_path / "plot.png", ["a", "b", "c"], far, find_anchors(far, 2, 0))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
