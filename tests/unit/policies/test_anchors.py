"""Matching prompts with anchors, against scikit-learn."""

import torch
from sklearn.neighbors import NearestNeighbors

from clasp_vllm.policies.anchors import Anchors


def test_the_nearest_by_cosine_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(30, 16, generator=generator)
    tasks = torch.arange(30) % 4
    prompts = torch.randn(200, 16, generator=generator) * 7
    matched, cosine = Anchors(vectors, tasks, torch.full((30,), -1.0)).match(prompts)
    distance, nearest = NearestNeighbors(n_neighbors=1, metric="cosine").fit(vectors).kneighbors(prompts)
    assert matched.tolist() == tasks[nearest[:, 0]].tolist()
    torch.testing.assert_close(1 - cosine, torch.from_numpy(distance[:, 0]).float(), atol=1e-5, rtol=0)


def test_what_is_near_to_nothing_is_of_no_task():
    anchors = Anchors(torch.eye(3), torch.tensor([5, 6, 7]), torch.tensor([0.9, 0.9, 0.5]))
    prompts = torch.tensor([[0.0, 2.0, 0.1], [1.0, 1.0, 0.0], [0.9, 0.0, 1.0]])
    matched, cosine = anchors.match(prompts.bfloat16())
    assert matched.tolist() == [6, -1, 7]  # each task says how near is near enough
    # The nearest is not near enough, another is.
    matched, _ = anchors.match(torch.tensor([[0.8, 0.0, 0.6]]))
    assert matched.tolist() == [7]
    assert abs(float(cosine[1]) - 0.5**0.5) < 1e-3
