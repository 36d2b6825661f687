"""Prompt lookup: what was written last comes first. The lookup itself is vLLM's."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from clasp_vllm.engine.lookup import RECENT, PromptLookup

MAX_MODEL_LEN, LONGEST = 160, 4


@pytest.fixture(scope="module")
def lookup() -> PromptLookup:
    config: Any = SimpleNamespace(
        speculative_config=SimpleNamespace(
            prompt_lookup_min=2, prompt_lookup_max=4, num_speculative_tokens=LONGEST
        ),
        model_config=SimpleNamespace(max_model_len=MAX_MODEL_LEN),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )
    return PromptLookup(config)


def matches(lookup: PromptLookup, sequences: list[list[int]], rows: list[int]) -> list[list[int]]:
    lengths = [len(tokens) for tokens in sequences]
    tokens = np.full((4, MAX_MODEL_LEN), -1, dtype=np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
    return lookup.matches(rows, lengths, tokens)


def filler(count: int) -> list[int]:
    return list(range(1000, 1000 + count))


FAR = [7, 8, 1, 2, 3, 4, 5]  # what follows "7 8" at first,
NEAR = [7, 8, 6, 6, 6, 6, 6]  # and later


def test_what_was_written_last_comes_first(lookup):
    near = [*FAR, *filler(RECENT), *NEAR, *filler(9), 7, 8]
    far = [*FAR, *filler(RECENT), 7, 8]
    both_near = [*FAR, *NEAR, *filler(9), 7, 8]
    assert matches(lookup, [near, far, both_near], [0, 1, 2]) == [[6] * 4, [1, 2, 3, 4], [1, 2, 3, 4]]


def test_others_have_none(lookup):
    short, none = [7, 8, 9, 7, 8], filler(12)
    assert matches(lookup, [short, none, short], [0, 1]) == [[9, 7, 8], [], []]


@pytest.mark.parametrize("room", [0, 1, 3])
def test_nothing_beyond_the_end_of_the_context(lookup, room):
    full = [*filler(MAX_MODEL_LEN - room - len(NEAR) - 2), *NEAR, 7, 8]
    assert matches(lookup, [full], [0]) == [[6] * room]
