import numpy as np
import torch

from clasp_vllm.drafting.sequences import SequenceTable
from clasp_vllm.skipping.skip_mask import layers_mask

INITIAL = layers_mask(4, [1])[None]
FOUND = layers_mask(4, [2, 3])[None]


def table(capacity: int = 3) -> SequenceTable:
    return SequenceTable(capacity, INITIAL)


def test_new_sequences_start_with_the_initial_mask():
    sequences = table()
    slots = sequences.slots(["a", "b"])
    assert len(set(slots.tolist())) == 2
    assert torch.equal(sequences.masks[slots], INITIAL.repeat(2, 1, 1, 1))


def test_a_reused_slot_starts_afresh():
    sequences = table(2)
    slots = sequences.slots(["a", "b"])
    sequences.set_masks(["a", "b"], FOUND.repeat(2, 1, 1, 1))
    sequences.advance(slots, np.array([0, 1]))
    sequences.slots(["b"])  # a is now the one seen longest ago
    slot = sequences.slots(["c"])
    assert slot == slots[0]
    assert torch.equal(sequences.masks[slot][0], INITIAL)
    assert sequences.due(slot, interval=100, limit=1).tolist() == [0]
    assert len(sequences) == 2


def test_masks_of_forgotten_sequences_are_dropped():
    sequences = table(1)
    sequences.slots(["a"])
    slot = sequences.slots(["b"])
    sequences.set_masks(["a"], FOUND[None])
    assert torch.equal(sequences.masks[slot][0], INITIAL)


def test_due_every_interval_oldest_first_within_the_limit():
    sequences = table(4)
    ids = ["a", "b", "c", "d"]
    slots = sequences.slots(ids)
    assert sequences.due(slots, 3, 2).tolist() == [0, 1]  # never optimised, in order
    sequences.advance(slots, np.array([0, 1]))
    assert sequences.due(slots, 3, 4).tolist() == [2, 3]
    sequences.advance(slots, np.array([2, 3]))
    assert sequences.due(slots, 3, 4).tolist() == []
    sequences.advance(slots, np.array([], dtype=np.int64))
    assert sequences.due(slots, 3, 4).tolist() == [0, 1]
    sequences.advance(slots, np.array([], dtype=np.int64))
    assert sequences.due(slots, 3, 1).tolist() == [0]


def test_interval_one_is_always_due():
    sequences = table(1)
    slots = sequences.slots(["a"])
    for _ in range(3):
        assert sequences.due(slots, 1, 1).tolist() == [0]
        sequences.advance(slots, np.array([0]))


def test_version_changes_with_every_mask():
    sequences = table(1)
    versions = [sequences.version]
    sequences.slots(["a"])
    versions.append(sequences.version)
    sequences.set_masks(["a"], FOUND[None])
    versions.append(sequences.version)
    sequences.slots(["b"])
    versions.append(sequences.version)
    assert len(set(versions)) == len(versions)


def test_the_initial_mask_is_that_of_sequences_without_their_own():
    table = SequenceTable(3, torch.zeros(1, 4, 2, dtype=torch.bool))
    slots = table.slots(["a", "b"])
    table.advance(slots, renewed=np.array([0]))
    own = torch.ones(1, 1, 4, 2, dtype=torch.bool)
    table.set_masks(["a"], own)
    version, mask = table.version, torch.eye(4, 2).bool()[None]
    table.set_initial_mask(mask)
    assert table.version > version
    assert torch.equal(table.masks[slots[0]], own[0])
    assert torch.equal(table.masks[slots[1]], mask)
    assert torch.equal(table.masks[table.slots(["c"])[0]], mask)


def test_new_sequences_spread_once_an_average_is_known():
    """The first are due at once; later ones wait, each differently, for up to the interval."""
    many = SequenceTable(100, torch.zeros(1, 4, 2, dtype=torch.bool))
    assert len(many.due(many.slots(["a", "b"]), interval=20, limit=8)) == 2
    many.spread = 20
    slots = many.slots([str(i) for i in range(40)])
    assert sorted(set(many.age[slots].tolist())) == list(range(21))
    assert 1 <= len(many.due(slots, interval=20, limit=100)) <= 4
    other = SequenceTable(100, torch.zeros(1, 4, 2, dtype=torch.bool))
    other.spread = 20
    assert (other.age[other.slots([str(i) for i in range(40)])] == many.age[slots]).all()
    for _ in range(20):
        many.advance(slots, np.array([], dtype=np.int64))
    assert len(many.due(slots, interval=20, limit=100)) == 40
    assert not many.has_own[slots].any()
    many.advance(slots, np.array([3]))
    assert many.has_own[slots].tolist() == [i == 3 for i in range(40)]


def test_a_reused_slot_has_no_mask_of_its_own():
    table = SequenceTable(1, torch.zeros(1, 4, 2, dtype=torch.bool))
    table.advance(table.slots(["a"]), renewed=np.array([0]))
    assert table.has_own.tolist() == [True]
    table.slots(["b"])
    assert table.has_own.tolist() == [False]


def test_new_sequences_take_the_slots_of_others_than_those_of_the_batch():
    table = SequenceTable(3, torch.zeros(1, 4, 2, dtype=torch.bool))
    a, b, _ = table.slots(["a", "b", "gone"]).tolist()
    new, still_a, still_b = table.slots(["new", "a", "b"]).tolist()
    assert (still_a, still_b) == (a, b)
    assert new not in (a, b)
