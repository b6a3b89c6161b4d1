import pytest
import torch

from llamagen.generation import uniform_draws
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
