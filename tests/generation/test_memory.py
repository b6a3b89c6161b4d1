"""How many images fit into memory at once."""

import pytest

from llamagen.generation import memory
from tests.tiny_models import tiny_transformer


@pytest.mark.parametrize("sequences", [1, 2, 3])
def test_every_sequence_of_an_image_counts(monkeypatch, sequences):
    model = tiny_transformer()
    free = {"bytes": 10**5}
    monkeypatch.setattr(memory, "free_memory", lambda _: free["bytes"])
    while memory.sampling_batch_size(model, sequences=1) < 12:
        free["bytes"] += 10**4
    assert memory.sampling_batch_size(model, sequences=sequences) == 12 // sequences
