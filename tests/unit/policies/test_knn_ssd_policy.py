"""KNN-SSD's policy alone: prompts in chunks, requests that begin again or are gone."""

import torch

from clasp_vllm.drafting.sequences import SequenceTable
from clasp_vllm.policies.anchors import Anchors
from clasp_vllm.policies.knn_ssd import KnnSsd

TASKS = torch.zeros(3, 4, 2, dtype=torch.bool)
TASKS[0, 1] = TASKS[1, 2] = True  # the third skips nothing: for prompts of no task
NEAR, FAR, OTHER = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[-1.0, -1.0]])


def policy(capacity: int = 2) -> tuple[KnnSsd, SequenceTable]:
    sequences = SequenceTable(capacity, TASKS[2:])
    anchors = Anchors(torch.eye(2), torch.tensor([0, 1]), torch.tensor([0.5, 0.5]))
    return KnnSsd(sequences, anchors, TASKS, ["a", "b", "none"]), sequences


def mask_of(sequences: SequenceTable, name: str) -> list:
    return sequences.masks[sequences.slots([name])[0], 0].tolist()


def test_chunks_are_averaged():
    knn, sequences = policy()
    sequences.slots(["r"])
    knn.read([("r", 0, NEAR.repeat(3, 1), False)])
    knn.read([("r", 3, FAR, True)])
    knn.apply()
    assert mask_of(sequences, "r") == TASKS[0].tolist()
    assert knn.take_tasks() == {"a": 1}


def test_a_prompt_read_anew_from_the_start_counts_once():
    """Preempted after a chunk: without forgetting that, it would outweigh the rest."""
    knn, sequences = policy()
    sequences.slots(["r"])
    knn.read([("r", 0, NEAR.repeat(5, 1), False)])
    knn.read([("r", 0, FAR.repeat(3, 1), True)])
    knn.apply()
    assert mask_of(sequences, "r") == TASKS[1].tolist()


def test_what_is_found_for_a_request_that_is_gone_changes_no_other():
    knn, sequences = policy()
    sequences.slots(["r"])
    knn.read([("r", 0, NEAR, True)])
    sequences.slots(["s", "t"])  # one of them has its slot
    knn.apply()
    assert set(sequences._slots) == {"s", "t"}
    assert mask_of(sequences, "s") == mask_of(sequences, "t") == TASKS[2].tolist()
    assert knn.take_tasks() == {"a": 1}


def test_near_to_nothing():
    knn, sequences = policy()
    sequences.slots(["r"])
    knn.read([("r", 0, OTHER, True)])
    knn.apply()
    assert mask_of(sequences, "r") == TASKS[2].tolist()
    assert knn.take_tasks() == {"none": 1}
