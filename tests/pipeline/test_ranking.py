"""The best of several candidates, and what blends do to them."""

import pytest
import torch

from llamagen.generation.likelihood import code_log_likelihoods
from llamagen.pipeline.ranking import best_of_each, score_images
from llamagen.support.errors import InputError
from tests.tiny_models import tiny_pipeline, tiny_text_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@torch.no_grad()
def test_likelihoods_are_those_of_the_models_logits(pipe):
    codes = pipe("dog", num_images_per_prompt=3, seed=0, output_type="codes").codes
    labels = torch.full((3,), 1)
    found = code_log_likelihoods(pipe.transformer, codes, labels)
    logits = pipe.transformer(codes.flatten(1)[:, :-1], labels).log_softmax(-1)
    wanted = logits.gather(2, codes.flatten(1).unsqueeze(2)).view(3, 4, 4)
    assert torch.allclose(found, wanted, atol=1e-5)
    none = torch.full((3,), pipe.transformer.config.num_classes)
    without = code_log_likelihoods(pipe.transformer, codes, labels, conditional=False)
    assert torch.allclose(without, code_log_likelihoods(pipe.transformer, codes, none), atol=1e-5)


@pytest.mark.parametrize("rank_by", ["likelihood", "condition"])
def test_the_best_of_each_image_are_kept(pipe, rank_by):
    settings = {"seed": 4, "batch_size": 5}
    every = pipe(["dog", "cat"], num_images_per_prompt=6, **settings)
    best = pipe(["dog", "cat"], num_images_per_prompt=2, best_of=3, rank_by=rank_by, **settings)
    conditions = [one for one in pipe.conditions(["dog", "cat"]) for _ in range(6)]
    scores = score_images(pipe.transformer, every.codes, conditions, rank_by)
    chosen = scores.view(4, 3).argmax(1) + 3 * torch.arange(4)
    assert best.seeds == tuple((4 + chosen).tolist())
    assert torch.equal(best.codes, every.codes[chosen])
    assert len(best.images) == len(best.metadata) == 4
    assert [about["class"] for about in best.metadata] == ["dog", "dog", "cat", "cat"]
    assert best.metadata[0]["best_of"] == 3
    # A winner's own seed makes it again.
    again = pipe("dog", seed=best.seeds[0])
    assert torch.equal(again.codes[0], best.codes[0])


def test_the_first_of_equals_wins():
    assert best_of_each(torch.tensor([1.0, 1.0, 0.0, 2.0, 3.0, 3.0]), 3) == [0, 4]


def test_both_conditions_of_a_blend_count(pipe):
    codes = pipe("dog", num_images_per_prompt=2, seed=0, output_type="codes").codes

    def score(prompt, **blend):
        conditions = pipe.conditions(prompt, **blend) * 2
        return score_images(pipe.transformer, codes, conditions, "likelihood")

    mixed = score("dog", blend="cat", blend_share=0.25)
    assert torch.allclose(mixed, 0.75 * score("dog") + 0.25 * score("cat"))


def test_a_blend_is_described(pipe):
    output = pipe(["dog", "cat"], blend=["cat", "crane"], blend_share=0.3, seed=0)
    assert [about["blend"] for about in output.metadata] == ["cat", "crane"]
    assert output.metadata[0]["blend_share"] == 0.3
    texts = tiny_text_pipeline()("a dog", blend="a longer text of a cat", seed=0)
    assert texts.metadata[0]["blend"] == "a longer text of a cat"


def test_rejects_invalid_arguments(pipe):
    with pytest.raises(InputError, match="wolf"):
        pipe("dog", blend="wolf")
    with pytest.raises(InputError, match="3 prompts to blend with for 1 prompts"):
        pipe("dog", blend=["cat", "cat", "cat"])
    with pytest.raises(InputError, match="blend_share is 2"):
        pipe("dog", blend="cat", blend_share=2)
    with pytest.raises(InputError, match=r"known_codes have shape \(3, 4, 4\)"):
        pipe("dog", known_codes=torch.full((3, 4, 4), -1))
    with pytest.raises(InputError, match="with no prompt"):
        tiny_text_pipeline()(prompt_embeds=torch.zeros(1, 3, 16), blend="a dog")
