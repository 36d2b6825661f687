"""The stand-in for CUDA graphs does what they do, and refuses what they cannot do."""

import pytest
import torch
from tape import TapeError, recorded


def test_it_replays_on_the_same_memory_with_numbers_as_they_were():
    x, out, factor = torch.tensor([1.0, 2.0]), torch.zeros(2), 3.0
    tape = recorded(lambda: out.copy_((x * factor).add_(1)), [x])
    x.copy_(torch.tensor([5.0, 6.0]))
    factor = 4.0
    tape.replay()
    assert out.tolist() == [16.0, 19.0]


def test_what_one_tape_made_and_is_kept_another_reads():
    x, out, kept = torch.tensor([1.0]), torch.zeros(1), []
    first = recorded(lambda: kept.append(x + 1), [x])
    second = recorded(lambda: out.copy_(kept[0][:1] * 2), [x])
    x.fill_(4.0)
    first.replay()
    second.replay()
    assert out.item() == 10.0


def test_memory_freed_after_the_capture_is_missed():
    out, temporary = torch.zeros(2), [torch.ones(2)]
    tape = recorded(lambda: out.copy_(temporary[0] + 1), [out])
    temporary.clear()
    with pytest.raises(TapeError, match="freed"):
        tape.replay()


def test_the_host_cannot_read():
    x, constant = torch.ones(3), torch.ones(3)
    with pytest.raises(TapeError, match="reads"):
        recorded(lambda: int((x + 1).sum()), [x])
    recorded(lambda: int(constant.sum()), [x])
