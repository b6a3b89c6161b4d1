import itertools
from collections import Counter

import pytest

from llamagen.data.loader import DataOrder, Draw

KNOWN_ORDER = [1, 5, 2, 4, 3, 0]
KNOWN_NUMBER = 136


def draws(order, steps):
    return [draw for step in range(steps) for draw in order.batch(step)]


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (10, 5), (3, 8), (1, 4)])
def test_reads_every_sample_once_an_epoch(count, batch_size):
    order = DataOrder(count=count, batch_size=batch_size, seed=1)
    drawn = draws(order, 20)
    assert len(drawn) == 20 * batch_size
    whole = len(drawn) // count
    counts = Counter(draw.epoch for draw in drawn)
    for epoch in range(whole):
        assert counts[epoch] == count
        assert {d.index for d in drawn if d.epoch == epoch} == set(range(count))


def test_depends_on_seed_and_step_only():
    order = DataOrder(count=100, batch_size=8, seed=1)
    later = [order.batch(step) for step in (30, 2)]
    again = DataOrder(count=100, batch_size=8, seed=1)
    assert [again.batch(step) for step in (30, 2)] == later
    assert DataOrder(count=100, batch_size=8, seed=2).batch(2) != later[1]


def test_epochs_differ():
    order = DataOrder(count=50, batch_size=50, seed=0)
    first, second = ([draw.index for draw in order.batch(step)] for step in (0, 1))
    assert first != second
    assert first != sorted(first)


def test_known_order():
    # Frozen: a run must go on in the same order with a later version of this program.
    order = DataOrder(count=6, batch_size=6, seed=3)
    assert [draw.index for draw in order.batch(0)] == KNOWN_ORDER
    assert order.random(Draw(0, 4)).randrange(1000) == KNOWN_NUMBER


def test_each_sample_has_its_own_generator():
    order = DataOrder(count=6, batch_size=6, seed=3)
    numbers = {
        order.random(Draw(epoch, index)).random() for epoch in range(3) for index in range(6)
    }
    assert len(numbers) == 18


def test_groups_samples_by_length():
    count, batch, group = 50, 4, 3
    lengths = [(index * 37) % 101 for index in range(count)]
    plain = DataOrder(count=count, batch_size=batch, seed=5)
    grouped = DataOrder(
        count=count,
        batch_size=batch,
        seed=5,
        group=group,
        lengths=lambda indices: [lengths[index] for index in indices],
    )
    places = set()
    for first in range(0, 60, group):
        batches = [grouped.batch(first + number) for number in range(group)]
        # The same samples as without, in other batches.
        drawn = [draw for each in batches for draw in each]
        assert Counter(drawn) == Counter(draws(plain, first + group)[first * batch :])
        spans = sorted(
            (min(lengths[d.index] for d in each), max(lengths[d.index] for d in each), number)
            for number, each in enumerate(batches)
        )
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        places.add(tuple(number for *_, number in spans))
    assert len(places) > 1, "short ones do not always come first"
