"""How many images fit into memory at once."""

import pytest

from llamagen.generation import memory
from tests.tiny_models import tiny_transformer


@pytest.mark.parametrize(
    ("guided", "blended", "sequences"),
    [(False, False, 1), (True, False, 2), (False, True, 2), (True, True, 3)],
)
def test_every_sequence_of_an_image_counts(monkeypatch, guided, blended, sequences):
    model = tiny_transformer()
    free = {"bytes": 10**5}
    monkeypatch.setattr(memory, "free_memory", lambda _: free["bytes"])
    while memory.sampling_batch_size(model, guided=False) < 12:
        free["bytes"] += 10**4
    size = memory.sampling_batch_size(model, guided=guided, blended=blended)
    assert size == 12 // sequences
