"""What an observer is told of rounds."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_target import BLOCK, Target

from clasp_vllm.bench.inspection import MaskRecorder
from clasp_vllm.control.controller import Controller
from clasp_vllm.control.costs import LayerShares
from clasp_vllm.control.planner import Choice
from clasp_vllm.drafting.batch import NgramMatches
from clasp_vllm.drafting.draft import DrafterOptions, DraftOutput
from clasp_vllm.drafting.drafter import Drafter
from clasp_vllm.drafting.observer import RoundObserver
from clasp_vllm.drafting.passes import Model, Passes
from clasp_vllm.drafting.scratch import ScratchBlocks
from clasp_vllm.drafting.sequences import SequenceTable
from clasp_vllm.policies.clasp import Clasp
from clasp_vllm.skipping.skip_mask import layers_mask

LAYERS, LENGTH, SKIPPED = 6, 4, 3
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9]]
CPU = torch.device("cpu")


class Recorder(RoundObserver):
    def __init__(self, instead: DraftOutput | None = None) -> None:
        self.instead = instead
        self.told: list[tuple] = []

    def round_started(self, batch, num_tokens, sample):
        self.told.append(("started", batch.request_ids, num_tokens))
        return self.instead

    def round_ended(self, batch, drafted):
        self.told.append(("ended", drafted))

    def verified(self, request_ids, lengths, rejected):
        self.told.append(("verified", request_ids, lengths - 1 - rejected.numpy()))


@pytest.fixture
def target() -> Target:
    return Target(PROMPTS)


def drafter_of(target: Target, **options) -> Drafter:
    scratch = ScratchBlocks(target.cache.scratch_block, len(PROMPTS), SKIPPED, BLOCK, CPU)
    passes = Passes(Model(target.decoder(), target.head), target.cache, scratch)
    sequences = SequenceTable(8, layers_mask(LAYERS, range(1, 1 + SKIPPED))[None])
    policy = Clasp(sequences, passes, (SKIPPED,), max_requests=2)
    drafting = DrafterOptions((SKIPPED,), (None,), 2, 0.0)
    return Drafter(target.decoder(), passes, sequences, policy, drafting, **options)


def greedy(target: Target):
    return lambda hidden, positions, step, rows, exact=None: (target.head(hidden).argmax(-1), None)


@torch.inference_mode()
def test_a_round_is_told_of_with_its_masks_and_drafts(target):
    seen, unseen = drafter_of(target), drafter_of(target)
    observer = seen.observer = Recorder()
    batch = target.batch()
    output = seen.draft(batch, LENGTH, greedy(target))
    assert output.tokens.equal(unseen.draft(batch, LENGTH, greedy(target)).tokens)
    seen.observe(batch.request_ids, np.full(3, 1 + LENGTH), torch.tensor([0, 1, 4]))
    (started, (_, drafted), verified) = observer.told
    assert started == ("started", ["0", "1", "2"], LENGTH)
    assert drafted.output is output
    assert drafted.choice.length == LENGTH
    assert drafted.skipping.tolist() == [0, 1, 2]
    assert not drafted.looked_up.any()
    assert drafted.skip_drafts.due.tolist() == [0, 1]  # two at once
    assert drafted.skip_drafts.masks.equal(seen.sequences.masks[drafted.slots, 0])
    assert drafted.skip_drafts.masks[:, :, 0].sum(1).tolist() == [SKIPPED] * 3
    assert drafted.skip_drafts.events[2].seconds_since(drafted.skip_drafts.events[0]) > 0
    assert verified[1] == ["0", "1", "2"]
    assert verified[2].tolist() == [4, 3, 0]


@torch.inference_mode()
def test_drafts_of_an_observer_take_the_place_of_the_drafters(target):
    made_up = DraftOutput(torch.ones(3, 2, dtype=torch.int64), torch.tensor([0, 1, 2]), np.full((3, 2), -1))
    drafter = drafter_of(target)
    observer = drafter.observer = Recorder(made_up)
    assert drafter.draft(target.batch(), LENGTH, greedy(target)) is made_up
    assert [what for what, *_ in observer.told] == ["started"]
    assert drafter.statistics.total.rounds == 0
    drafter.observer = None
    assert drafter.draft(target.batch(), LENGTH, greedy(target)) is not made_up
    assert len(observer.told) == 1


@torch.inference_mode()
def test_a_failure_is_told_of_and_an_observers_own_is_none(target):
    drafter = drafter_of(target, on_failure=lambda error, before: None)
    drafter.start(CPU)
    observer = drafter.observer = Recorder()
    assert drafter.draft(target.batch(), LENGTH, None) is None  # nothing to sample with
    assert observer.told[-1] == ("ended", None)
    drafter.observer = SimpleNamespace(round_started=lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        drafter.draft(target.batch(), LENGTH, greedy(target))
    assert drafter.statistics.total.failures == 1


@torch.inference_mode()
def test_what_each_request_skipped_is_recorded(target, monkeypatch):
    """Where a draft was looked up, nothing was skipped."""

    def make_controller(costs) -> Controller:
        shares = LayerShares(0.5, 0.5)
        return Controller(
            costs,
            8,
            (SKIPPED,),
            (None,),
            LAYERS,
            shares,
            LENGTH,
            2,
            (),
            padded=False,
            drop_stopped=True,
            ranks=1,
        )

    drafter = drafter_of(target, make_controller=make_controller)
    drafter.drop_stopped = True
    drafter.start(CPU)
    choice = Choice(0, LENGTH, ngram=2)
    monkeypatch.setattr(drafter.controller, "choose", lambda *_: choice)
    monkeypatch.setattr(drafter.controller.ngram_lengths, "predict", lambda *_: np.array([0, 2, 0]))
    recorder = drafter.observer = MaskRecorder()
    batch = replace(target.batch(), ngrams=NgramMatches.of([[], [7, 8], []], LENGTH))
    output = drafter.draft(batch, LENGTH, greedy(target))
    assert output.tokens[1, :2].tolist() == [7, 8]
    assert recorder.masks["1"] == [None]
    for request in ("0", "2"):
        (mask,) = recorder.masks[request]
        assert mask.shape == (LAYERS, 2)
        assert mask[:, 0].sum() == SKIPPED
