"""Training in random orders: one of each image and step, whatever interrupts or splits the run."""

import dataclasses

import pytest
import torch

from llamagen.checkpoints import load_transformer
from llamagen.models.transformer import Transformer
from llamagen.pipeline import Pipeline
from llamagen.support.errors import InputError
from llamagen.training import train_transformer
from llamagen.training.next_code import NextCodeModel
from tests.tiny_models import tiny_pipeline, tiny_transformer
from tests.training.runs import assert_same_state, records, state, transformer_recipe


@pytest.fixture
def train(digits, tokenizer_folder):
    def run(out, **changes):
        recipe = transformer_recipe(digits, tokenizer_folder, out, **changes)
        if "init" not in changes or recipe.model.order == "raster":
            recipe = dataclasses.replace(
                recipe, model=dataclasses.replace(recipe.model, order="random")
            )
        return train_transformer(recipe, quiet=True)

    return run


def test_resumed_run_matches_uninterrupted(train, tmp_path):
    changes = {"ema_decay": 0.9, "gradient_accumulation": 2, "code_noise": 0.2}
    train(tmp_path / "whole", **changes)
    train(tmp_path / "parts", steps=2, **changes)
    torch.manual_seed(12345)
    train(tmp_path / "parts", **changes)
    assert_same_state(state(tmp_path / "parts", 4), state(tmp_path / "whole", 4))
    assert records(tmp_path / "parts")[-1] == records(tmp_path / "whole")[-1]


def test_exported_model_draws_in_passes(train, tmp_path):
    result = train(tmp_path / "run", sample_every=4)
    pipe = Pipeline.from_pretrained(result.out / "pipeline")
    assert pipe.transformer.config.order == "random"
    first = pipe("0", seed=3, steps=4).images[0]
    assert first.tobytes() == pipe("0", seed=3, steps=4).images[0].tobytes()
    assert list((tmp_path / "run" / "samples").glob("*.png"))


def test_starts_from_a_raster_model(train, digits, tokenizer_folder, tmp_path):
    raster = transformer_recipe(digits, tokenizer_folder, tmp_path / "raster")
    folder = train_transformer(raster, quiet=True).out / "pipeline"
    # Nothing is learnt in a step of length 0.
    train(tmp_path / "random", init=str(folder), steps=1, lr=1e-30, save_every=1, log_every=1)
    before = load_transformer(folder).state_dict()
    after = load_transformer(tmp_path / "random" / "pipeline").state_dict()
    query = after.pop("pos_instruct_embeddings")
    assert 0 < query.abs().max() < 0.2
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_model_of_random_order_stays_one(train, digits, tokenizer_folder, tmp_path):
    pipeline = tiny_pipeline(order="random", codebook_size=64, grid=(4, 4), num_classes=5)
    pipeline.save_pretrained(tmp_path / "model")
    recipe = transformer_recipe(
        digits, tmp_path / "model" / "tokenizer", tmp_path / "run", init=str(tmp_path / "model")
    )
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dim=32, heads=4))
    train_transformer(recipe, quiet=True)
    assert load_transformer(tmp_path / "run" / "pipeline").config.order == "random"


@torch.no_grad()
def test_loss_is_that_of_all_queries():
    model = tiny_transformer(order="random")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(64, (3, 16), generator=generator)
    order = torch.rand(3, 16, generator=generator).argsort(1)
    labels = torch.tensor([0, 1, 5])
    drawn = codes.gather(1, order)
    loss = NextCodeModel(model)(drawn[:, :-1], labels, drawn, order=order)
    logits = model(drawn[:, :-1], labels, order=order)
    expected = -logits.log_softmax(-1).gather(2, drawn.unsqueeze(-1)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    # What comes later in the order decides nothing before it.
    drawn[:, 9:] = 0
    torch.testing.assert_close(model(drawn[:, :-1], labels, order=order)[:, :10], logits[:, :10])


def test_activation_checkpointing_changes_no_gradient():
    model = tiny_transformer(order="random").train()
    codes = torch.randint(64, (2, 15), generator=torch.Generator().manual_seed(1))
    order = torch.rand(2, 16, generator=torch.Generator().manual_seed(2)).argsort(1)

    def gradients(recompute):
        model.recompute_blocks = recompute
        model.zero_grad()
        torch.manual_seed(0)
        model(codes, torch.tensor([0, 1]), order=order).square().mean().backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    plain, recomputed = gradients(False), gradients(True)
    assert plain["pos_instruct_embeddings"].abs().max() > 0
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_order_must_be_known():
    with pytest.raises(InputError, match="order is 'sideways', expected 'raster' or 'random'"):
        Transformer(dataclasses.replace(tiny_transformer().config, order="sideways"))
