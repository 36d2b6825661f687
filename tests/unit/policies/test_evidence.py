import pytest
import torch

from clasp_vllm.policies.evidence import SkipEvidence

LAYERS, COLUMNS = 4, 3
MEANS = torch.ones(LAYERS, 5)


def margins(*values: float) -> torch.Tensor:
    """[layers, columns, rows], the same in every cell of a row."""
    return torch.tensor(values).expand(LAYERS, COLUMNS, len(values))


def evidence() -> SkipEvidence:
    return SkipEvidence(8, LAYERS, COLUMNS, memory=0.8, device=torch.device("cpu"))


def test_nothing_is_known_at_first():
    assert evidence().prior(torch.tensor([1]), torch.tensor([True])) is None


def test_a_sequence_has_its_own_average_and_a_new_one_that_of_all():
    known = evidence()
    known.update(torch.tensor([3, 5]), margins(1.0, -0.5), None, MEANS)
    prior = known.prior(torch.tensor([5, 3, 7]), torch.tensor([False, False, True]))
    assert prior.shape == (LAYERS, COLUMNS, 3)
    assert prior[0, 0].tolist() == [-0.5, 1.0, 0.25]


def test_a_reused_slot_starts_from_the_average_of_all():
    known = evidence()
    known.update(torch.tensor([3]), margins(1.0), None, MEANS)
    known.update(torch.tensor([4]), margins(0.0), None, MEANS)
    assert known.prior(torch.tensor([3]), torch.tensor([True]))[0, 0].tolist() == [0.5]


def test_the_average_of_all_takes_a_token_for_what_it_says_alone():
    """Not for the blend with the prior, in which the average itself has most of the say."""
    known = evidence()
    known.update(torch.tensor([0]), margins(1.0), None, MEANS)
    prior = known.prior(torch.tensor([1]), torch.tensor([True]))
    known.update(torch.tensor([1]), 0.8 * prior + 0.2 * margins(-1.0), prior, MEANS)
    overall = known.prior(torch.tensor([2]), torch.tensor([True]))[0, 0, 0]
    assert overall == pytest.approx(0.0, abs=1e-6)  # two tokens, +1 and -1
    assert known.prior(torch.tensor([1]), torch.tensor([False]))[0, 0, 0] == pytest.approx(0.6)


def test_the_average_of_all_forgets_slowly():
    known = evidence()
    for _ in range(200):
        known.update(torch.tensor([0]), margins(1.0), None, MEANS)
    assert known.overall_choices().shape == (LAYERS, COLUMNS, 1)
    assert known.overall_choices().all()
    known.update(torch.tensor([0]), margins(-1.0), None, MEANS)
    assert known.prior(torch.tensor([1]), torch.tensor([True]))[0, 0, 0] == pytest.approx(0.9)
    for _ in range(40):
        known.update(torch.tensor([0]), margins(-1.0), None, MEANS)
    assert not known.overall_choices().any()


def test_the_centre_goes_from_nothing_to_the_mean_of_the_states():
    """And one broken state does not stay in it."""
    known = evidence()
    assert known.centre is None
    before = 0.0
    for passes in range(1, 100):
        broken = MEANS.clone()
        broken[0, 0] = float("nan")
        known.update(torch.tensor([0]), margins(1.0), None, broken)
        now = float(known.centre[1, 1])
        assert before < now < 1
        before = now
        if passes == 4:
            assert now == pytest.approx(0.5, abs=0.1)
    assert before > 0.9
    assert known.centre.isfinite().all()
    known.reset()
    assert known.centre is None
