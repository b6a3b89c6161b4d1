"""What a batch is given, as sequences that the model runs."""

import pytest
import torch

from llamagen.config import SamplingConfig
from llamagen.generation.sequences import sequences_of
from llamagen.models.transformer import SlotCache
from llamagen.support.errors import InputError
from tests.tiny_models import tiny_transformer

PLAIN, GUIDED = SamplingConfig(guidance_scale=1.0), SamplingConfig(guidance_scale=2.0)


def test_guidance_takes_two_sequences_per_image():
    model, labels = tiny_transformer(), torch.tensor([3, 1])
    plain = sequences_of(model, labels, seeds=[0, 1], sampling=PLAIN)
    assert not plain.guided
    assert plain.condition.tolist() == [3, 1]
    guided = sequences_of(model, labels, seeds=[0, 1], sampling=GUIDED)
    assert guided.guided
    assert guided.condition.tolist() == [3, 1, 5, 5]
    [(members, condition)] = guided.by_length()
    assert members == [0, 1, 2, 3]
    assert condition is guided.condition


@torch.inference_mode()
def test_groups_of_one_length_start_like_padded_ones():
    model = tiny_transformer(condition="text")
    features, against = torch.randn(2, 3, 6, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 1, 1, 1]])
    mask = torch.nn.functional.pad(mask, (1, 0))
    other = torch.tensor([[0, 0, 0, 0, 0, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    sequences = sequences_of(
        model,
        features,
        seeds=range(3),
        sampling=GUIDED,
        condition_mask=mask,
        unconditional=against,
        unconditional_mask=other,
    )
    # The padding that all share is gone.
    assert sequences.condition.shape == (6, 4, 16)
    cache = model.new_cache(6, condition_length=4)
    wanted = model.prefill(sequences.condition, cache, condition_mask=sequences.mask)
    groups = sequences.by_length()
    assert [members for members, _ in groups] == [[1, 3], [0, 2, 5], [4]]
    slots = SlotCache.empty(model.config, 6, grid=(4, 4), device=model.device, dtype=model.dtype)
    for members, condition in groups:
        torch.testing.assert_close(model.start(condition, slots), wanted[members])
    assert slots.conditions == [1, 1, 3, 3, 3, 4]


def test_a_condition_without_features_is_refused():
    model = tiny_transformer(condition="text")
    mask = torch.tensor([[1, 1], [0, 0]])
    sequences = sequences_of(
        model, torch.zeros(2, 2, 16), seeds=[0, 1], sampling=PLAIN, condition_mask=mask
    )
    with pytest.raises(InputError, match="leaves no text feature"):
        sequences.by_length()
