"""Numbers of other packages become Python's own."""

import numpy as np
import pytest
import torch

from llamagen.support.errors import InputError
from llamagen.support.values import plain, require_integer


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (np.int64(3), 3),
        (np.uint8(200), 200),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.array(7), 7),
        (np.array([1, 2]), [1, 2]),
        (np.str_("cat"), "cat"),
        (torch.tensor(3), 3),
        (torch.tensor([0.5], dtype=torch.bfloat16), [0.5]),
        (range(2), range(2)),
        ("cat", "cat"),
        (None, None),
    ],
)
def test_plain(value, wanted):
    found = plain(value)
    assert found == wanted
    assert type(found) is type(wanted)


def test_counts():
    for three in (3, np.int32(3), torch.tensor(3)):
        assert type(require_integer("n", three, 1)) is int
    with pytest.raises(InputError, match="n is 0, expected at least 1"):
        require_integer("n", np.int64(0), 1)
    for wrong in (2.0, np.float64(2), "2", True, [2], None):
        with pytest.raises(InputError, match="expected an integer"):
            require_integer("n", wrong, 1)
