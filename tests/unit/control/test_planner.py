"""The decision alone: what promises the most tokens per second."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clasp_vllm.control.costs import PassCosts
from clasp_vllm.control.gate import PROBE_SHARE, Probes
from clasp_vllm.control.planner import (
    HIGHEST_FLOOR,
    WORTH_IT,
    Batch,
    Choice,
    Ngrams,
    choose,
    draft_lengths,
)

NUM_LAYERS = 24
BUDGETS = np.arange(1, 17)
# Memory-bound up to about eight rows, like two cores with half a billion parameters.
COSTS = PassCosts(
    rows=(1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
    layer=(1.6e-3, 1.7e-3, 1.8e-3, 2.0e-3, 2.5e-3, 4.0e-3),
    fixed=(1.5e-3, 1.5e-3, 1.6e-3, 2.0e-3, 2.5e-3, 4.0e-3),
)


def batch(
    acceptance: np.ndarray,
    layers: np.ndarray,
    longest: int = 8,
    continuation_prob: float = 1.0,
    costs: PassCosts = COSTS,
    **settings,
) -> Batch:
    """Of [rows, budgets] acceptance, alike at every position."""
    every = np.repeat(acceptance[..., None], longest, axis=-1)
    settings = {"lengths": range(1, longest + 1)} | settings
    return Batch(costs, NUM_LAYERS, every, layers, np.full((2, longest), continuation_prob), **settings)


def decide(
    alpha: float, rows: int = 1, costs: PassCosts = COSTS, budgets=BUDGETS, longest: int = 8
) -> Choice:
    """All rows and budgets accepted alike."""
    acceptance = np.full((rows, len(budgets)), alpha)
    layers = (NUM_LAYERS - budgets).astype(float)
    return choose(batch(acceptance, layers, longest, costs=costs))


probability = st.floats(0.01, 0.99)
row_counts = st.integers(1, 32)


@given(probability, probability, row_counts, st.integers(1, 23))
def test_more_acceptance_never_shortens_drafts(a, b, rows, budget):
    low, high = sorted((a, b))
    budgets = np.array([budget])
    fewer, more = decide(low, rows, budgets=budgets), decide(high, rows, budgets=budgets)
    assert more.length >= fewer.length
    assert more.ratio >= fewer.ratio - 1e-12


@given(probability, row_counts, st.integers(1, 23), st.floats(1.0, 4.0))
def test_dearer_drafts_are_never_longer(alpha, rows, budget, factor):
    budgets = np.array([budget])
    dear = COSTS.scaled({"verify_scale": 1.0, "draft_scale": factor, "pass_scale": 1.0})
    usual, dearer = decide(alpha, rows, budgets=budgets), decide(alpha, rows, dear, budgets)
    assert dearer.length <= usual.length
    assert dearer.ratio <= usual.ratio + 1e-12


@given(st.floats(0.0, 0.05), row_counts)
def test_what_cannot_gain_is_not_worth_it(alpha, rows):
    assert decide(alpha, rows).ratio < WORTH_IT


def test_drafts_as_dear_as_the_model_never_pay():
    choice = choose(batch(np.full((1, 1), 0.999), np.full(1, float(NUM_LAYERS))))
    assert choice.ratio < WORTH_IT


@given(probability, row_counts, st.integers(1, 8))
def test_the_ratio_is_that_of_tokens_per_second(alpha, rows, longest):
    choice = decide(alpha, rows, longest=longest)
    assert 1 <= choice.length <= longest
    assert rows < choice.tokens <= rows * (1 + choice.length)
    drafting = choice.length * COSTS.draft_step(rows, NUM_LAYERS - BUDGETS[choice.budget])
    seconds = drafting + COSTS.verify(rows * (1 + choice.length), NUM_LAYERS)
    assert choice.seconds == pytest.approx(float(seconds))
    plain = float(COSTS.plain(rows, NUM_LAYERS))
    assert choice.ratio == pytest.approx(choice.tokens / rows * plain / choice.seconds)


@pytest.mark.parametrize("ngrams", [None, Ngrams(np.array([0.3]), np.array([2]))])
@pytest.mark.parametrize("rows", [1, 3])
def test_it_is_the_best_of_all(rows, ngrams):
    """Against trying every way, with early exit and acceptance that changes with the position, by loops."""
    random = np.random.default_rng(0)
    acceptance = random.uniform(0.1, 0.95, (rows, 3, 6))
    layers = np.array([18.0, 12.0, 8.0])
    continuation_prob = random.uniform(0.6, 0.9, (2, 6))
    every = rows + (ngrams is not None)

    def ratio(budget: int, length: int, taken: int) -> float:
        tokens, seconds, drafted = float(every), 0.0, 0.0
        chances = [
            np.mean([row[: k + 1].prod() for row in acceptance[:, budget]]) * continuation_prob[1, :k].prod()
            for k in range(length)
        ]
        for k in range(length):
            alive_prob = max(continuation_prob[0, :k].prod(), chances[k]) if k else 1.0
            some = 1 - (1 - alive_prob) ** rows
            seconds += some * float(COSTS.draft_step(max(1.0, rows * alive_prob / some), layers[budget]))
            drafted += rows * alive_prob
            tokens += rows * chances[k]
        for k in range(min(taken, 2)):
            drafted += 1
            tokens += 0.3 ** (k + 1)
        seconds += float(COSTS.verify(every + drafted, NUM_LAYERS))
        return tokens / every * float(COSTS.plain(every, NUM_LAYERS)) / seconds

    taken = [0] if ngrams is None else [1, 2]
    ways = [(budget, k, m) for budget in range(3) for k in range(7) for m in taken if k + m]
    choice = choose(Batch(COSTS, NUM_LAYERS, acceptance, layers, continuation_prob, range(1, 7)), ngrams)
    best = max(ways, key=lambda way: ratio(*way))
    assert (choice.budget, choice.length, choice.ngram) == best
    assert choice.ratio == pytest.approx(ratio(*best))


def test_matches_are_taken_when_they_are_good():
    own, layers = np.full((1, 16), 0.7), (NUM_LAYERS - BUDGETS).astype(float)

    def best(acceptance: float, length: int, others: np.ndarray = own) -> Choice:
        return choose(batch(others, layers), Ngrams(np.array([acceptance]), np.array([length])))

    nobody = np.zeros((0, 16))
    good, bad = best(0.9, 5, nobody), best(0.05, 5, nobody)
    assert (good.length, good.ngram) == (0, 5)
    assert good.tokens == pytest.approx(1 + sum(0.9**k for k in range(1, 6)))
    assert good.seconds == pytest.approx(float(COSTS.verify(6, NUM_LAYERS)))
    assert bad.ngram == 1
    assert bad.ratio < WORTH_IT


@given(probability, st.integers(0, 3), st.integers(1, 3), st.integers(1, 6))
def test_where_all_are_verified_in_full_matches_cost_all_rows(alpha, others, some, length):
    """Every row gets as many tokens to verify as any, and of those a number that may be chosen."""
    lengths = [length_ for length_ in draft_lengths(6) if length_]
    everyone = batch(np.full((others, 1), 0.7), np.full(1, 8.0), longest=6, lengths=lengths, padded=True)
    ngrams = Ngrams(np.full(some, alpha), np.full(some, length))
    choice = choose(everyone, ngrams)
    widest = max(choice.length, choice.ngram)
    assert widest in lengths
    assert choice.ngram
    assert bool(choice.length) <= bool(others)
    drafting = sum(float(COSTS.draft_step(others, 8.0)) for _ in range(choice.length))
    verified = float(COSTS.verify((others + some) * (1 + widest), NUM_LAYERS))
    assert choice.seconds == pytest.approx(drafting + verified)
    padded, rows = ngrams.best(COSTS, NUM_LAYERS, others, range(1, 7), padded=True).ratio, others + some
    plain = float(COSTS.plain(rows, NUM_LAYERS)) / rows
    assert padded == pytest.approx(
        max(
            (rows + some * sum(alpha**k for k in range(1, min(taken, length) + 1)))
            / float(COSTS.verify(rows * (1 + taken), NUM_LAYERS))
            * plain
            for taken in range(1, 7)
        )
    )


def test_padded_drafts_cost_their_full_length():
    acceptance, layers = np.full((4, 1), 0.9), np.full(1, 8.0)
    short = choose(batch(acceptance, layers, continuation_prob=0.9))
    padded = choose(
        batch(acceptance, layers, continuation_prob=0.9, padded=True, lengths=draft_lengths(8)[1:])
    )
    assert short.length > 1
    assert padded.length in (1, 2, 4, 8)
    assert padded.ratio < short.ratio


def test_a_length_that_is_fixed_is_kept():
    acceptance, layers = np.full((1, 1), 0.2), np.full(1, 8.0)
    assert choose(batch(acceptance, layers)).length < 8
    assert choose(batch(acceptance, layers, lengths=[8])).length == 8


@given(st.floats(0.3, 0.95), row_counts, st.floats(1.0, 3.0))
def test_the_floor_rises_with_what_a_token_costs(alpha, rows, factor):
    budgets, dear = np.array([16]), COSTS.scaled({"draft_scale": factor})
    usual, dearer = decide(alpha, rows, budgets=budgets), decide(alpha, rows, dear, budgets)
    assert 0 < usual.floor <= HIGHEST_FLOOR
    if usual.length == dearer.length:
        assert dearer.floor >= usual.floor * usual.seconds / dearer.seconds - 1e-9


def test_the_floor_is_where_a_further_token_pays():
    """One row: at that chance of all tokens, one more gains at the rate of the whole round."""
    choice = decide(0.8, budgets=np.array([16]))
    step = float(COSTS.draft_step(1, NUM_LAYERS - 16))
    verify = float(COSTS.verify(2 + choice.length, NUM_LAYERS) - COSTS.verify(1 + choice.length, NUM_LAYERS))
    assert 0.8 * choice.floor / (step + verify) == pytest.approx(choice.tokens / choice.seconds)


@given(st.floats(0.5, 200), st.integers(0, 32))
def test_costs_lie_on_lines_between_and_beyond_those_measured(rows, layers):
    cost = float(COSTS.forward(rows, layers))
    assert cost >= float(COSTS.forward(1, layers)) - 1e-12
    assert cost <= float(COSTS.forward(rows + 1, layers)) + 1e-12
    assert float(COSTS.forward(48, 10)) == pytest.approx(
        float(COSTS.forward(32, 10)) + (float(COSTS.forward(32, 10)) - float(COSTS.forward(16, 10)))
    )


def test_probes_lose_no_more_than_their_share():
    probes, choice, plain = Probes(), decide(0.3, 16), float(COSTS.plain(16, NUM_LAYERS))
    steps = 5000
    done = sum(probes.due(choice, plain) for _ in range(steps))
    assert done > 0
    assert done * (choice.seconds - plain) <= PROBE_SHARE * steps * plain


@given(probability, st.integers(1, 3), st.integers(1, 6))
def test_ngrams_alone_are_priced_as_beside_nobody(alpha, some, length):
    ngrams = Ngrams(np.full(some, alpha), np.full(some, length))
    choice = choose(batch(np.full((0, 1), 0.7), np.full(1, 8.0), longest=6), ngrams)
    alone = ngrams.best(COSTS, NUM_LAYERS, 0, range(1, 7), padded=False)
    assert (alone.length, alone.ngram) == (0, choice.ngram)
    assert (alone.ratio, alone.seconds, alone.tokens) == pytest.approx(
        (choice.ratio, choice.seconds, choice.tokens)
    )
