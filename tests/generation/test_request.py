import numpy as np
import pytest
import torch

from llamagen.generation import uniform_draws
from llamagen.generation.request import one_seed_each
from llamagen.support.errors import InputError


def test_a_stream_is_a_function_of_its_seed_alone():
    together = uniform_draws([3, 4, 3], 100)
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])
    assert torch.equal(uniform_draws([4], 40)[0], together[1, :40])


def test_a_seed_has_many_streams():
    streams = [uniform_draws([7], 1000, stream=number)[0] for number in (0, 1, 2, 2**64 - 1)]
    assert torch.equal(streams[0], uniform_draws([7], 1000)[0])
    assert len(torch.cat(streams).unique()) > 3990
    assert torch.equal(streams[1][:10], uniform_draws([3, 7], 10, stream=1)[1])


def test_streams_never_change():
    """Pinned: a seed noted down today must draw the same image in later versions."""
    expected = [0.8720734, 0.2953653, 0.4200976]
    assert uniform_draws([7], 3)[0].tolist() == pytest.approx(expected, abs=1e-7)
    expected = [0.7191169, 0.2079073, 0.7148628]
    assert uniform_draws([7], 3, stream=5)[0].tolist() == pytest.approx(expected, abs=1e-7)


def test_numbers_lie_in_the_half_open_interval():
    draws = uniform_draws(range(50), 5000)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert draws.mean().item() == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_outside_the_range_are_refused(seed):
    with pytest.raises(InputError, match="seed"):
        uniform_draws([seed], 1)


@pytest.mark.parametrize(
    "seed", [5, np.int64(5), np.array(5), torch.tensor(5)], ids=lambda seed: type(seed).__name__
)
def test_a_first_seed_of_any_package(seed):
    found = one_seed_each(seed, 2)
    assert found == (5, 6)
    assert {type(each) for each in found} == {int}


@pytest.mark.parametrize(
    "seeds",
    [
        (5, 9),
        [np.int32(5), torch.tensor(9)],
        np.array([5, 9]),
        torch.tensor([5, 9]),
        range(5, 13, 4),
    ],
    ids=lambda seeds: type(seeds).__name__,
)
def test_seeds_of_any_package(seeds):
    found = one_seed_each(seeds, 2)
    assert found == (5, 9)
    assert {type(each) for each in found} == {int}


def test_generators_draw_seeds():
    def generator(seed):
        return torch.Generator().manual_seed(seed)

    first = one_seed_each(None, 2, generator(3))
    assert first == one_seed_each(None, 2, generator(3))
    assert first[1] == first[0] + 1
    going_on = generator(3)
    assert one_seed_each(None, 1, going_on) != one_seed_each(None, 1, going_on)
    each = one_seed_each(None, 2, [generator(3), generator(4)])
    assert each[0] == first[0] != each[1]
    with pytest.raises(InputError, match="seed and generator were both given"):
        one_seed_each(1, 1, generator(3))


@pytest.mark.parametrize("seed", ["5", 1.0, np.float32(2), b"5", [1.5], [None], {"a": 1}])
def test_what_is_no_seed(seed):
    with pytest.raises(InputError, match=r"seed is .*, expected an integer"):
        one_seed_each(seed, 1)
