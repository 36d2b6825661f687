"""What the controller of a drafter does from round to round, its costs in numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from clasp_vllm.control.controller import PLAIN_EVERY, PLAIN_FIRST, Controller
from clasp_vllm.control.costs import SIZES, LayerShares, PassCosts
from clasp_vllm.control.gate import MATCH_PROBE, OFF_CHECK, State
from clasp_vllm.control.planner import Choice
from clasp_vllm.device import DeviceEvent

LAYERS, BUDGETS = 8, (2, 4)
MASKS = torch.zeros(16, len(BUDGETS), LAYERS, 2, dtype=torch.bool)


def controller(
    choices: tuple[str, ...],
    padded: bool = False,
    draft_cost: float = 1e-3,
    contexts: tuple[int | None, ...] = (None,),
) -> Controller:
    """One that finds drafts almost free, unless told what a layer of them costs of one of the target."""
    costs = PassCosts(tuple(map(float, SIZES)), (1e-3,) * len(SIZES), (0.0,) * len(SIZES))
    adaptive = Controller(
        costs,
        16,
        BUDGETS,
        contexts,
        LAYERS,
        LayerShares(0.5, 0.5),
        4,
        None,
        choices,
        padded=padded,
        drop_stopped=not padded,
        ranks=1,
    )
    adaptive.corrections.scales["draft_scale"][:] = draft_cost
    return adaptive


def chosen(adaptive: Controller, rows: int, rounds: int, room: bool = False) -> list[int]:
    """The draft lengths of so many rounds; with ``room`` as many tokens are allowed as were wanted before."""
    lengths, allowed = [], 4
    for _ in range(rounds):
        choice = adaptive.choose(np.arange(rows), MASKS, allowed)
        allowed = adaptive.requested_draft_length if room else 4
        lengths.append(choice.length)
    return lengths


# Where speculation pays, a round goes without drafts now and then, to learn what that costs.


@pytest.mark.parametrize("rows", [1, 5])
def test_one_round_of_many(rows):
    """At first more often: a wrong estimate of a plain step makes drafts seem to pay that do not."""
    gaps = [2, 4, 8, 16, 32, 64, 128, 128, 128]
    assert (gaps[0], gaps[-1]) == (PLAIN_FIRST, PLAIN_EVERY)
    lengths = chosen(controller(("length", "speculation")), rows, sum(gaps))
    plain = [round_ for round_, length in enumerate(lengths, start=1) if not length]
    assert plain == np.cumsum(gaps).tolist()


def test_each_size_has_its_own():
    adaptive = controller(("length", "speculation"))
    assert 0 in chosen(adaptive, 1, PLAIN_FIRST)
    assert 0 not in chosen(adaptive, 16, PLAIN_FIRST - 1)
    assert chosen(adaptive, 16, 1) == [0]
    assert 0 not in chosen(adaptive, 1, 2 * PLAIN_FIRST - 1)


def test_not_where_speculation_is_always_on():
    assert 0 not in chosen(controller(("length",)), 1, 2 * PLAIN_EVERY)


def test_where_room_is_made_ahead_the_next_round_has_none():
    lengths = chosen(controller(("length", "speculation"), padded=True), 1, PLAIN_FIRST + 4, room=True)
    assert [round_ for round_, length in enumerate(lengths, start=1) if not length] == [PLAIN_FIRST + 1]


def test_rounds_that_are_asked_for_no_drafts_do_not_put_it_off():
    """As vLLM 0.33 does in the last steps of requests: short ones would never have a plain step."""
    adaptive = controller(("length", "speculation"))
    for _ in range(PLAIN_FIRST - 1):
        assert chosen(adaptive, 1, 1) == [4]
        assert adaptive.choose(np.arange(1), MASKS, 0).length == 0
    assert chosen(adaptive, 1, 1) == [0]


def test_after_it_comes_a_new_decision():
    """What is chosen next goes by the batch as it is then, as in any round of speculation."""
    adaptive = controller(("length", "speculation"))
    assert chosen(adaptive, 1, PLAIN_FIRST)[-1] == 0
    assert adaptive.gate._off_steps == 0


# Where it does not seem to pay, what is not known counts for it.


def worth_drafting(rows: int, draft_cost: float, known: bool = False) -> bool:
    adaptive = controller(("length", "speculation"), draft_cost=draft_cost)
    if known:
        adaptive.evidence.drafts.variance[:] = 0.0
    return chosen(adaptive, rows, 1) != [0]


def test_new_sequences_are_given_a_chance():
    """What is known of a mean over many is more, so they are given less of it."""
    dear = {
        (rows, known): max(cost for cost in np.linspace(0.1, 3, 100) if worth_drafting(rows, cost, known))
        for rows in (1, 16)
        for known in (False, True)
    }
    assert dear[1, False] > dear[16, False] > dear[16, True]
    assert dear[1, True] == pytest.approx(dear[16, True])


def test_optimism_ends_with_what_tokens_can_tell():
    """A sequence of which much has been seen gets none."""
    adaptive = controller(("length", "speculation"))
    one, won = np.array([0]), np.array([[True, False, True, False]])
    for _ in range(100):
        adaptive.evidence.drafts.add(one, one, np.full((1, 4), 0.5), won, np.ones((1, 4), dtype=bool))
    assert (adaptive.evidence.acceptance(one, optimism=3.0) == adaptive.evidence.acceptance(one)).all()
    assert (adaptive.evidence.acceptance(one + 1, optimism=3.0) > adaptive.evidence.acceptance(one + 1)).all()


@pytest.mark.parametrize("draft_cost", [0.5, 0.73])
def test_optimism_says_whether_and_not_how(draft_cost):
    """What is done and promised is what is thought best, though optimism alone makes it worth a try."""
    uncertain, known = (controller(("length", "speculation"), draft_cost=draft_cost) for _ in range(2))
    known.evidence.drafts.variance[:] = 0.0
    always = controller(("length",), draft_cost=draft_cost)
    for one in (uncertain, known, always):
        chosen(one, 1, 1)
    assert uncertain.last == known.last == always.last
    dear = draft_cost > 0.7
    assert uncertain.gate.state is (State.TRYING if dear else State.SPECULATING)
    assert known.gate.state is (State.OFF if dear else State.SPECULATING)
    assert always.gate.state is State.SPECULATING


def test_while_off_new_sequences_trigger_a_decision():
    adaptive = controller(("length", "speculation"), draft_cost=0.5)
    adaptive.evidence.drafts.offset[:] = adaptive.evidence.drafts.mean[:] = -2.0
    assert chosen(adaptive, 4, 2) == [0, 0]
    adaptive.evidence.drafts.mean[:] = 2.0
    adaptive.evidence.start(0)
    assert chosen(adaptive, 4, 1) == [0]  # one of four
    adaptive.evidence.start(1)
    assert chosen(adaptive, 4, 1) != [0]


def test_without_its_requests_it_still_knows_what_passes_cost():
    adaptive = controller(("length", "speculation"), draft_cost=9.0)
    fresh = adaptive.evidence.acceptance(np.arange(2))
    off = chosen(adaptive, 2, 3)
    adaptive.learn(np.zeros((20, len(BUDGETS))), np.zeros(20, dtype=int), 0, np.full(20, 100))
    assert (adaptive.evidence.acceptance(np.arange(2)) < fresh).all()
    assert adaptive.last is not None
    adaptive.reset()
    assert (adaptive.evidence.acceptance(np.arange(2)) == fresh).all()
    assert adaptive.last is None
    assert chosen(adaptive, 2, 3) == off == [0, 0, 0]


def test_drafts_by_weights_of_their_own_are_predicted_by_their_own_costs():
    """Else their correction would count once more what they save, and they would look far too cheap."""
    adaptive = controller(("length",), draft_cost=1.0)
    half = tuple(seconds / 2 for seconds in adaptive.costs.layer)
    adaptive.costs = replace(adaptive.costs, draft_layer=half, draft_fixed=adaptive.costs.fixed)
    predicted = adaptive.draft_seconds(1, [0, 1] * LAYERS)
    assert predicted == pytest.approx(LAYERS * 0.5e-3)
    assert predicted == pytest.approx(
        float(adaptive.costs.scaled(adaptive.rank_sync.scales).draft_step(1, LAYERS))
    )


# While speculation is off, most steps cost nothing.


def off_controller() -> tuple[Controller, list[str]]:
    """One that has just found that drafts do not pay, and the requests of that round."""
    adaptive = controller(("length", "speculation"), draft_cost=1e3)
    adaptive.evidence.drafts.variance[:] = 0.0
    assert chosen(adaptive, 2, 1) == [0]
    adaptive.round_ended(["a", "b"], None, DeviceEvent(torch.device("cpu")))
    return adaptive, ["a", "b"]


def test_most_steps_are_left_out_while_off():
    adaptive, requests = off_controller()
    assert [adaptive.idles(requests) for _ in range(OFF_CHECK)] == [True] * (OFF_CHECK - 1) + [False]
    assert adaptive.gate.due(2, adaptive.evidence.started)


def test_no_step_is_left_out_when_the_batch_changes_or_speculation_is_on():
    adaptive, requests = off_controller()
    assert not adaptive.idles([*requests, "c"])
    on = controller(("length", "speculation"))
    assert chosen(on, 2, 1) != [0]
    on.round_ended(requests, None, DeviceEvent(torch.device("cpu")))
    assert not on.idles(requests)


def test_speculation_that_has_lost_what_it_may_is_off():
    adaptive = controller(("length", "speculation"))
    adaptive.gate.budget.balance = 0.0
    assert chosen(adaptive, 1, 1) == [0]
    assert chosen(controller(("length",)), 1, 1) != [0]


# Prompt-lookup matches while drafting by skipping is off.


def with_matches(adaptive: Controller, *lengths: int) -> Choice:
    slots = np.arange(len(lengths))
    return adaptive.choose(slots, MASKS, 4, np.array(lengths))


def test_matches_that_pay_are_taken_without_a_decision():
    adaptive, requests = off_controller()
    decisions = []
    best = adaptive.pricing.best
    adaptive.pricing.best = lambda *args: decisions.append(args) or best(*args)
    adaptive.evidence.ngrams.offset[:] = 3.0
    left = []
    for round_ in range(1, OFF_CHECK):
        choice = with_matches(adaptive, 4, 0)
        assert (choice.length, choice.ngram) in ((0, 4), (0, 0))
        left += [] if choice.ngram else [round_]
        adaptive.round_ended(requests, None, DeviceEvent(torch.device("cpu")))
    assert left == [2, 6, 14, 30, 62, 126]  # to measure a plain step
    assert adaptive.gate.state is State.OFF
    assert not decisions
    for _ in range(len(left) + 1):
        assert with_matches(adaptive, 0, 0).ngram == 0
    assert len(decisions) == 2  # with optimism and without


def test_after_matches_are_verified_nothing_is_to_be_done():
    """And what they took is known all the same."""
    adaptive, requests = off_controller()
    adaptive.evidence.ngrams.offset[:] = 3.0
    assert with_matches(adaptive, 4, 0).ngram
    adaptive.round_ended(requests, None, DeviceEvent(torch.device("cpu")))
    before = adaptive.corrections.scales["verify_scale"].copy()
    adaptive.observe(requests, np.array([5, 1]), torch.tensor([0, 0]))
    assert adaptive.idles(requests)
    adaptive.observe(requests, np.array([1, 1]), None)
    assert (adaptive.corrections.scales["verify_scale"] != before).any()


def test_matches_that_do_not_pay_are_left():
    adaptive, _ = off_controller()
    adaptive.evidence.ngrams.offset[:] = -5.0
    assert with_matches(adaptive, 4, 4).ngram == 0


def test_matches_are_tried_again_though_verification_seems_dear():
    """As after a pause of the machine while some were verified."""
    adaptive, requests = off_controller()
    adaptive.evidence.ngrams.offset[:] = 3.0
    adaptive.corrections.scales["verify_scale"][:] = 5.0
    taken = []
    for _ in range(3 * MATCH_PROBE):
        taken.append(with_matches(adaptive, 4, 4).ngram > 0)
        adaptive.round_ended(requests, None, DeviceEvent(torch.device("cpu")))
    # In the place of the second a plain step is measured.
    assert [i for i, one in enumerate(taken) if one] == [MATCH_PROBE - 1, 3 * MATCH_PROBE - 1]


def test_matches_have_a_budget_of_their_own():
    adaptive, _ = off_controller()
    adaptive.evidence.ngrams.offset[:] = 3.0
    adaptive.gate.budget.balance = 0.0
    assert with_matches(adaptive, 4, 4).ngram
    adaptive.gate.match_budget.balance = -1.0
    assert not with_matches(adaptive, 4, 4).ngram


# Windows of context.

CONTEXTS = (None, 1024, 256)
READING = {"context_rows": (1.0,), "context": (1e-5,), "context_query": (0.0,)}


def with_windows(**costs) -> Controller:
    """One for which reading 100 tokens costs what a layer does. Drafts pay, whatever they see."""
    adaptive = controller(("length",), draft_cost=0.3, contexts=CONTEXTS)
    adaptive.costs = replace(adaptive.costs, **(READING | costs))
    adaptive.evidence._curve[:] = 0.95
    adaptive.evidence.start(0)
    return adaptive


def window_chosen(adaptive: Controller, *lengths: int) -> int | None:
    return CONTEXTS[choice_of(adaptive, *lengths).context]


def choice_of(adaptive: Controller, *lengths: int) -> Choice:
    return adaptive.choose(np.arange(len(lengths)), MASKS, 4, lengths=np.array(lengths))


def test_a_window_is_chosen_where_the_context_is_long():
    assert window_chosen(with_windows(), 200) is None
    assert window_chosen(with_windows(), 9000) in (1024, 256)
    assert window_chosen(with_windows(context=()), 9000) is None  # not known to cost anything
    assert window_chosen(with_windows(), 200, 250, 300) is None
    assert window_chosen(with_windows(), 200, 9000) in (1024, 256)


def test_a_window_that_loses_is_widened():
    """By the sequences it loses for. What is known of the sequence itself stays."""
    adaptive, one = with_windows(), np.array([0])
    known, none, all_four = adaptive.evidence, np.zeros(1, dtype=np.int64), np.array([4])
    rejected = np.array([True])
    used = []
    for _ in range(60):  # all is accepted of drafts that see everything, of others nothing
        choice = choice_of(adaptive, 9000)
        whole = not choice.context
        used.append(whole)
        accepted = all_four if whole else none
        known.add_verified(one, choice.budget, none, accepted, rejected != whole, choice.context)
    assert not used[0]
    assert sum(used) > 40
    assert sum(used[-20:]) > 15
    assert known.acceptance(one)[0, 0, 0] > 0.9
    assert (known.acceptance(one, context=2) <= known.acceptance(one, context=1)).all()
    assert (known.acceptance(one, context=1) <= known.acceptance(one)).all()
    known.forget(10_000)
    assert window_chosen(adaptive, 9000) is not None  # it is tried again


def test_drafts_with_a_window_are_predicted_by_what_they_see():
    adaptive = with_windows()
    window = window_chosen(adaptive, 9000)
    assert window is not None
    predicted = adaptive.draft_seconds(1, [0, 1] * LAYERS)
    assert predicted == pytest.approx(LAYERS * (1e-3 + window * 1e-5))  # without correction


def test_a_sequence_shorter_than_the_window_says_nothing_of_it():
    """And is expected to be accepted as with all of the context."""
    evidence = with_windows().evidence
    evidence.start(1)
    both, none, cut = np.array([0, 1]), np.zeros(2, dtype=np.int64), np.array([True, False])
    whole, windowed = evidence.acceptance(both), evidence.acceptance(both, context=1, cut=cut)
    assert (windowed[0] < whole[0]).all()
    assert (windowed[1] == whole[1]).all()
    before = evidence.windows[0].offset.copy(), evidence.drafts.offset.copy()
    evidence.add_verified(both, 0, none, none, np.array([True, True]), 1, cut)
    assert evidence.windows[0].offset[0] < before[0][0]
    assert evidence.windows[0].offset[1] == before[0][1]
    assert (evidence.drafts.offset[:2] < before[1][:2]).all()


def test_what_is_accepted_makes_no_window_better_than_all():
    evidence, one = with_windows().evidence, np.array([0])
    for _ in range(50):
        evidence.add_verified(one, 0, one * 0, one + 4, one > 0, 1)
    assert evidence.windows[0].offset[0] == 0.0


def test_a_narrow_window_that_does_well_raises_the_wider_ones():
    evidence, one = with_windows().evidence, np.array([0])
    for _ in range(200):
        evidence.add_verified(one, 0, one, np.array([3]), np.array([False]), 2)
    narrow, wide = (evidence.windows[context].offset[0] for context in (1, 0))
    assert narrow > -0.3
    assert wide >= narrow


def test_passes_over_a_window_teach_the_curve_of_budgets():
    """By what they show beside what the window loses anyway; sequences shorter than it lose nothing."""
    budgets = len(BUDGETS)
    for length, follows in ((200, 0.3), (9000, 0.0)):
        adaptive = with_windows()
        evidence = adaptive.evidence
        evidence.windows[0].offset[0] = -2.0
        curve = evidence.acceptance(np.array([0]))[0, 0, 0]
        expected = 1 / (1 + np.exp(-(np.log(curve / (1 - curve)) - 2.0)))
        random = np.random.default_rng(0)
        for _ in range(400):
            agree = np.repeat(random.random((1, 1)) < expected, budgets, axis=1)
            adaptive.learn(agree.astype(float), np.array([0]), 1, np.array([length]))
        assert abs(curve - evidence.acceptance(np.array([0]))[0, 0, 0] - follows) < 0.12


@pytest.mark.parametrize("needed", [True, False])
def test_a_round_whose_pass_the_budget_does_not_bear_is_not_begun(needed):
    adaptive = controller(("length", "speculation"))
    masks = torch.zeros(16, len(BUDGETS), LAYERS, 2, dtype=torch.bool)
    adaptive.gate.budget.balance = 4.0  # a plain step of four rows, and a pass takes several
    choice = adaptive.choose(np.arange(4), masks, 4, due=lambda interval: (4, needed))
    assert (choice.length == 0) == needed
    assert adaptive.passes.most == needed
