"""The programme against the readable reference, and both against brute force."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clasp_vllm.skipping.dynamic_program import backtrack, backtrack_all, columns_at, run_programme
from clasp_vllm.skipping.reference import best_skip_set

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


class ToyModel:
    """Residual layers of float64, so that ties and rounding do not blur the comparison."""

    def __init__(self, num_layers: int, hidden: int, seed: int, device: str = "cpu", gain: float = 0.6):
        generator = torch.Generator().manual_seed(seed)
        self.num_layers = num_layers
        self.weights = [
            (torch.randn(hidden, hidden, generator=generator, dtype=torch.float64) * gain / hidden**0.5).to(
                device
            )
            for _ in range(num_layers)
        ]
        self.x0 = torch.randn(3, hidden, generator=generator, dtype=torch.float64).to(device)

    def delta(self, i: int, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weights[i]) * (1 + i % 3)

    def layers(self):
        return [lambda x, i=i: x + self.delta(i, x) for i in range(self.num_layers)]

    def layer(self, i, state):
        x = state[0] + state[1]
        state[0].zero_()  # a layer may work in place
        state[1].zero_()
        return self.delta(i, x), x

    def run(self, max_skipped: int, **options):
        state = self.x0, torch.zeros_like(self.x0)
        return run_programme(state, self.layer, self.num_layers, max_skipped, **options)

    def forward(self, x: torch.Tensor, skipped: frozenset[int]) -> torch.Tensor:
        for i, layer in enumerate(self.layers()):
            if i not in skipped:
                x = layer(x)
        return x


def skip_sets(mask: torch.Tensor) -> list[frozenset[int]]:
    return [frozenset(row.nonzero().flatten().tolist()) for row in mask]


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=40, deadline=None)
@given(num_layers=st.integers(1, 9), seed=st.integers(0, 10_000))
def test_equals_the_reference(device, num_layers, seed):
    model = ToyModel(num_layers, 8, seed, device)
    for budget in range(num_layers):
        programme = model.run(budget)
        mask = programme.mask(budget)
        assert (mask.sum(1) == budget).all()
        for row, got in enumerate(skip_sets(mask)):
            expected, state = best_skip_set(model.x0[row], model.layers(), budget)
            assert got == expected
            torch.testing.assert_close(sum(programme.states)[budget, row], state)


@settings(max_examples=40, deadline=None)
@given(num_layers=st.integers(2, 9), seed=st.integers(0, 10_000))
def test_states_are_compared_from_the_centre(num_layers, seed):
    model = ToyModel(num_layers, 8, seed)
    centre = torch.randn(num_layers, 8, generator=torch.Generator().manual_seed(seed))
    programme = model.run(num_layers // 2, centre=centre)
    for row, got in enumerate(skip_sets(programme.mask(num_layers // 2))):
        assert got == best_skip_set(model.x0[row], model.layers(), num_layers // 2, centre=centre)[0]


def test_means_are_those_of_the_full_model():
    model = ToyModel(7, 8, seed=5)
    state, programme = model.x0, model.run(3)
    for layer, mean in zip(model.layers(), programme.means, strict=True):
        state = layer(state)
        torch.testing.assert_close(mean, state.mean(0).float())


def test_column_states_are_those_of_their_masks():
    """What a column ends with is what the model computes when it leaves out that column's layers."""
    model = ToyModel(10, 12, seed=1)
    programme = model.run(6)
    for budget in range(7):
        for row, skipped in enumerate(skip_sets(programme.mask(budget))):
            state = model.forward(model.x0[row], skipped)
            torch.testing.assert_close(sum(programme.states)[budget, row], state)


def test_skipping_nothing_is_the_full_model():
    model = ToyModel(7, 8, seed=2)
    programme = model.run(0)
    full = torch.stack([model.forward(x, frozenset()) for x in model.x0])
    assert torch.equal(sum(programme.states)[0], full)
    assert not programme.mask(0).any()
    torch.testing.assert_close(programme.similarity, torch.ones(1, 3))


def test_columns_grow_with_the_layers():
    """After i layers no more than i can be skipped: the columns beyond need not be run."""
    model, ran = ToyModel(10, 8, seed=4), []

    def layer(i, state):
        assert state[0].shape == state[1].shape
        ran.append(state[0].shape[0] // len(model.x0))
        return model.layer(i, state)

    run_programme((model.x0, torch.zeros_like(model.x0)), layer, 10, 5)
    assert ran == [columns_at(i, 5) for i in range(10)] == [1, 2, 4, 4, 6, 6, 6, 6, 6, 6]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), memory=st.floats(0.05, 0.95))
def test_prior_counts_by_its_share(seed, memory):
    """Each choice goes by the blend, the states are those of the choices, and 1 is all but the prior."""
    model = ToyModel(8, 8, seed)
    x0 = (model.x0, torch.zeros_like(model.x0))
    prior = torch.rand(8, 5, 3) - 0.5
    programme = run_programme(x0, model.layer, 8, 4, prior, memory)
    for row, skipped in enumerate(skip_sets(programme.mask(4))):
        assert len(skipped) == 4
        torch.testing.assert_close(sum(programme.states)[4, row], model.forward(model.x0[row], skipped))
    own = (programme.margins - memory * prior) / (1 - memory)
    free = torch.arange(5).view(1, 5, 1) <= torch.arange(8).view(8, 1, 1)
    free[:, 0] = False
    assert own[free.expand_as(own)].abs().max() <= 2 + 1e-5  # a difference of cosines
    nearly_all = run_programme(x0, model.layer, 8, 4, prior * 1e6, 0.999)
    assert torch.equal((nearly_all.margins > 0)[free.expand_as(own)], (prior > 0)[free.expand_as(own)])
    ignored = run_programme(x0, model.layer, 8, 4, prior, 0.0)
    torch.testing.assert_close(ignored.margins, model.run(4).margins)


def test_budget_per_row():
    model = ToyModel(8, 8, seed=3)
    programme = model.run(5)
    budgets = torch.tensor([1, 5, 3])
    mixed = programme.mask(budgets)
    assert mixed.sum(1).tolist() == budgets.tolist()
    for row, budget in enumerate(budgets.tolist()):
        assert torch.equal(mixed[row], programme.mask(budget)[row])


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5])
def test_close_to_brute_force(budget, record_property):
    """The programme is greedy in its states, so it may miss the best set: say by how much."""
    gaps, ranks = [], []
    for seed in range(12):
        model = ToyModel(8, 16, seed)
        chosen_sets = skip_sets(model.run(budget).mask(budget))
        for row, x0 in enumerate(model.x0):
            full = model.forward(x0, frozenset())
            cosine = {
                skipped: torch.cosine_similarity(model.forward(x0, skipped), full, dim=-1).item()
                for skipped in map(frozenset, combinations(range(8), budget))
            }
            best = max(cosine.values())
            gaps.append(best - cosine[chosen_sets[row]])
            ranks.append(sum(c > cosine[chosen_sets[row]] for c in cosine.values()) / len(cosine))
    assert min(gaps) >= 0
    mean_gap, mean_rank = sum(gaps) / len(gaps), sum(ranks) / len(ranks)
    record_property("mean_gap", mean_gap)
    print(
        f"budget {budget} of 8: cosine {mean_gap:.4f} below the optimum, better than "
        f"{1 - mean_rank:.1%} of all sets"
    )
    assert mean_rank < 0.15


@pytest.mark.parametrize("max_skipped", [-1, 4, 5])
def test_budget_out_of_range(max_skipped):
    with pytest.raises(ValueError, match=r"max_skipped must be in \[0, 4\)"):
        ToyModel(4, 4, 0).run(max_skipped)


def test_state_may_be_low_precision():
    model = ToyModel(6, 32, seed=5)
    model.weights = [w.bfloat16() for w in model.weights]
    model.x0 = model.x0.bfloat16()
    mask = model.run(3).mask(3)
    assert (mask.sum(1) == 3).all()


def test_all_budgets_backtracked_at_once():
    choices = torch.rand(7, 5, 3, generator=torch.Generator().manual_seed(0)) > 0.5
    choices[:, 0] = False
    choices |= torch.arange(5).view(1, -1, 1) > torch.arange(7).view(-1, 1, 1)
    masks = backtrack_all(choices, torch.tensor([1, 2, 4]))
    assert torch.equal(masks, torch.stack([backtrack(choices, budget) for budget in (1, 2, 4)], dim=1))


def test_a_draft_of_other_weights_is_compared_with_the_full_model():
    """The reference's states stand for column 0's; with the model's own, nothing changes."""
    model = ToyModel(7, 8, seed=11)
    x, states = model.x0, []
    for layer in model.layers():
        x = layer(x)
        states.append(x.float())
    reference = torch.stack(states)
    own, given = model.run(4), model.run(4, reference=reference)
    assert torch.equal(own.margins > 0, given.margins > 0)
    torch.testing.assert_close(own.similarity, given.similarity)
    torch.testing.assert_close(own.means, given.means)
    # Of a target whose layer 2 does nothing, skipping it loses nothing, whatever the draft's does.
    without = [x.float() for x in states]
    y = model.x0
    for i, layer in enumerate(model.layers()):
        y = y if i == 2 else layer(y)
        without[i] = y.float()
    assert skip_sets(model.run(1, reference=torch.stack(without)).mask(1)) == [frozenset({2})] * 3
