"""Discriminator, LPIPS, dead codes and other starting points in the tokenizer's training."""

import dataclasses

import pytest
import torch

from llamagen.evaluation.networks.lpips import Lpips
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.support.errors import InputError
from llamagen.training import train_tokenizer
from llamagen.training.adversarial import (
    PatchDiscriminator,
    StyleDiscriminator,
    adaptive_weight,
    generator_loss,
)
from llamagen.training.config import (
    AdversarialConfig,
    AugmentationConfig,
    ImageConfig,
    PerceptualConfig,
    TokenizerTraining,
)
from llamagen.training.losses import total_loss
from llamagen.training.metrics import CodebookUsage
from llamagen.training.recipes import load_recipe, recipe_to_yaml
from llamagen.training.tokenizer_task import make_task
from tests.tiny_models import tiny_tokenizer
from tests.training.runs import assert_same_state, records, state, tokenizer_recipe

IMAGES = ImageConfig(size=24, validation_fraction=0.2)


def recipe_with(digits, out, *, adversarial=None, **changes):
    adversarial = AdversarialConfig(
        **{"adversarial_weight": 0.5, "adversarial_start": 0, **(adversarial or {})}
    )
    return tokenizer_recipe(
        digits, out, images=IMAGES, adversarial=adversarial, dropout=0.0, **changes
    )


def make(digits, out, **options):
    torch.manual_seed(0)
    task = make_task(recipe_with(digits, out, **options))
    task.adversary.train()
    return task, next(task.batches(0, 1))


def gradients(module):
    return {
        name: parameter.grad.clone()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def test_both_sides_get_their_own_gradients(digits, tmp_path):
    task, batch = make(digits, tmp_path)
    losses = task.losses(task.model, batch, step=0, adversary=task.adversary)
    losses.total.backward()
    assert gradients(task.adversary) == {}
    ours = gradients(task.model)
    losses.adversary.backward()
    after = gradients(task.model)
    assert all(torch.equal(ours[name], after[name]) for name in ours)
    assert len(gradients(task.adversary)) == len(list(task.adversary.parameters()))
    # The same by the usual way: a discriminator whose weights are frozen for a while.
    task.model.zero_grad()
    task.adversary.zero_grad()
    task.adversary.requires_grad_(False)
    images = batch["pixels"].float() / 127.5 - 1
    output = task.model(images)
    terms = task._terms(output, images)
    judged = generator_loss("hinge", task.adversary(output.reconstruction))
    (total_loss(terms) + 0.5 * judged).backward()
    for name, gradient in gradients(task.model).items():
        torch.testing.assert_close(gradient, ours[name], rtol=1e-4, atol=1e-7)


def test_judging_leaves_the_statistics_alone(digits, tmp_path):
    task, batch = make(digits, tmp_path)
    before = {name: value.clone() for name, value in task.adversary.named_buffers()}
    images = batch["pixels"].float() / 127.5 - 1
    output = task.model(images)
    task._generator_term(output.reconstruction, task._terms(output, images), {})
    assert before
    for name, value in task.adversary.named_buffers():
        assert torch.equal(value, before[name])


def test_nothing_is_judged_before_the_start(digits, tmp_path):
    task, batch = make(digits, tmp_path, adversarial={"adversarial_start": 3})
    for step, judged in ((2, False), (3, True)):
        losses = task.losses(task.model, batch, step=step, adversary=task.adversary)
        assert (losses.adversary is not None) == judged
        assert ("generator" in losses.metrics) == judged


def test_adaptive_weight(digits, tmp_path):
    task, batch = make(digits, tmp_path, adversarial={"adaptive_weight": True})
    metrics = {}
    images = batch["pixels"].float() / 127.5 - 1
    output = task.model(images)
    terms = task._terms(output, images)
    term = task._generator_term(output.reconstruction, terms, metrics)
    expected = adaptive_weight(
        terms["reconstruction"].value, term.value, task.model.decoder.conv_out.weight
    )
    assert metrics["adaptive_weight"].item() == pytest.approx(expected.item())
    assert float(term.weight) == pytest.approx(0.5 * expected.item())


@pytest.fixture
def narrow(monkeypatch):
    """Discriminators of few channels, whose checkpoints are small."""
    for module, name in (
        (PatchDiscriminator, "base_channels"),
        (StyleDiscriminator, "max_channels"),
    ):
        monkeypatch.setitem(module.__init__.__kwdefaults__, name, 8)


@pytest.mark.parametrize("name", ["patchgan", "stylegan"])
@pytest.mark.parametrize("kind", ["hinge", "vanilla", "non-saturating"])
def test_every_kind_trains_and_resumes(digits, tmp_path, narrow, name, kind):
    adversarial = {"discriminator": name, "adversarial_loss": kind, "adversarial_start": 1}
    for out, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        recipe = recipe_with(digits, tmp_path / out, adversarial=adversarial, steps=steps)
        result = train_tokenizer(recipe, quiet=True)
    assert {"generator", "discriminator", "discriminator_grad_norm"} <= set(result.train)
    assert_same_state(state(tmp_path / "parts", 4), state(tmp_path / "whole", 4))
    # It is no part of what is exported.
    ImageTokenizer.from_pretrained(result.model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adversarial_weight": -1}, "adversarial_weight is -1, expected a finite number"),
        ({"adversarial_start": -1}, "adversarial_start is -1, expected at least 0"),
        ({"discriminator": "resnet"}, "discriminator is 'resnet', expected one of patchgan"),
        ({"adversarial_loss": "wgan"}, "adversarial_loss is 'wgan', expected one of hinge"),
    ],
)
def test_bad_values(changes, message):
    with pytest.raises(InputError, match=message):
        AdversarialConfig(**changes)


def test_images_too_small_for_the_discriminator(digits, tmp_path):
    recipe = tokenizer_recipe(
        digits, tmp_path / "out", adversarial=AdversarialConfig(adversarial_weight=1.0)
    )
    with pytest.raises(InputError, match="24"):
        train_tokenizer(recipe, quiet=True)


def test_tokenizers_are_not_sharded(digits, tmp_path):
    with pytest.raises(InputError, match="too small to be split; use ddp"):
        tokenizer_recipe(digits, tmp_path, parallel="fsdp")


def test_learning_rates():
    assert AdversarialConfig().lr(1e-4) == 1e-4
    assert AdversarialConfig(discriminator="stylegan").lr(1e-4) == 2e-3
    assert AdversarialConfig(discriminator_lr=5e-4).lr(1e-4) == 5e-4


def test_recipes_keep_the_new_fields(digits, tmp_path):
    recipe = recipe_with(digits, tmp_path, adversarial={"discriminator": "stylegan"})
    recipe = dataclasses.replace(
        recipe, perceptual=PerceptualConfig(perceptual_weight=1.0), revive_codes_every=7
    )
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    assert load_recipe(TokenizerTraining, tmp_path / "recipe.yaml") == recipe


def test_lpips_is_a_term_but_not_trained(digits, tmp_path, monkeypatch):
    torch.manual_seed(0)
    network = Lpips((4, 4, 4, 4, 4))
    monkeypatch.setattr("llamagen.training.tokenizer_task.load_lpips", lambda _: network)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    recipe = tokenizer_recipe(
        digits, tmp_path / "out", perceptual=PerceptualConfig(perceptual_weight=2.0), dropout=0.0
    )
    result = train_tokenizer(recipe, quiet=True)
    train = result.train
    assert train["loss"] == pytest.approx(
        train["reconstruction"] + train["codebook"] + 0.25 * train["commitment"]
        + 2.0 * train["perceptual"],
        rel=1e-5,
    )  # fmt: skip
    assert "perceptual" in result.validation
    assert not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any("lin0" in name for name in state(tmp_path / "out", 4))


class TestDeadCodes:
    def test_unused(self):
        usage = CodebookUsage(6, window=8)
        usage.add(torch.tensor([0, 1, 2, 3]))
        # Not a whole window yet.
        assert usage.unused().tolist() == []
        usage.add(torch.tensor([0, 1, 2, 2]))
        assert usage.unused().tolist() == [4, 5]
        usage.mark_used(torch.tensor([4]))
        assert usage.unused().tolist() == [5]

    def test_revived(self, digits, tmp_path, monkeypatch):
        monkeypatch.setattr("llamagen.training.tokenizer_task._USAGE_WINDOW", 64)
        usages = {}
        for every in (0, 2):
            for steps in (6, 12):
                recipe = tokenizer_recipe(
                    digits, tmp_path / str(every), revive_codes_every=every, steps=steps,
                    dropout=0.0, augmentation=AugmentationConfig(flip=False),
                )  # fmt: skip
                result = train_tokenizer(recipe, quiet=True)
            usages[every] = result.validation["codebook_usage"]
        assert usages[2] > usages[0]
        assert result.train["revived_codes"] > 0
        whole = dataclasses.replace(recipe, out=tmp_path / "whole")
        train_tokenizer(whole, quiet=True)
        assert_same_state(state(tmp_path / "2", 12), state(tmp_path / "whole", 12))

    @pytest.mark.parametrize(
        ("every", "window", "note"),
        [
            # A batch of four images has 64 latents.
            (3, 300, "latents: the first are revived after step 6\n"),
            (3, 3000, "the first are revived after step 48, but the run ends after 6\n"),
            (3, 192, None),
            (9, 64, "the first are revived after step 9, but the run ends after 6\n"),
            (0, 3000, None),
        ],
    )
    def test_says_when_it_begins(self, digits, tmp_path, monkeypatch, capsys, every, window, note):
        monkeypatch.setattr("llamagen.training.tokenizer_task._USAGE_WINDOW", window)
        train_tokenizer(tokenizer_recipe(digits, tmp_path, revive_codes_every=every, steps=6))
        shown = capsys.readouterr().out
        assert ("revived after" in shown) == (note is not None)
        assert note is None or note in shown


class TestFineTuning:
    def test_starts_where_the_other_ended(self, digits, tmp_path):
        first = train_tokenizer(tokenizer_recipe(digits, tmp_path / "first"), quiet=True)
        recipe = tokenizer_recipe(
            digits, tmp_path / "second", init=str(first.model), lr=1e-12, steps=1
        )
        second = train_tokenizer(recipe, quiet=True)
        assert second.validation["psnr"] == pytest.approx(first.validation["psnr"], abs=1e-4)

    def test_resumes_without_the_source(self, digits, tokenizer_folder, tmp_path):
        import shutil

        source = shutil.copytree(tokenizer_folder, tmp_path / "source")
        for steps in (1, 2):
            recipe = tokenizer_recipe(
                digits, tmp_path / "out", init=str(source), steps=steps,
                images=ImageConfig(size=16, validation_fraction=0.2),
            )  # fmt: skip
            train_tokenizer(recipe, quiet=True)
            shutil.rmtree(source, ignore_errors=True)
        model = ImageTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
        assert model.config == tiny_tokenizer().config

    def test_missing_source(self, digits, tmp_path):
        recipe = tokenizer_recipe(digits, tmp_path / "out", init=str(tmp_path / "missing"))
        with pytest.raises((InputError, FileNotFoundError)):
            train_tokenizer(recipe, quiet=True)
        assert not (tmp_path / "out").exists()


def test_usage_counts_once(digits, tmp_path):
    """Each code of a training batch is: 36 of each of 4 images, which are judged as well."""
    train_tokenizer(recipe_with(digits, tmp_path / "out", steps=2), quiet=True)
    assert state(tmp_path / "out", 2)["task"]["usage"]["seen"] == 2 * 4 * 36
    assert records(tmp_path / "out")[-1]["codebook_usage"] > 0


def test_the_decoder_alone(digits, tmp_path):
    """Codes of every image stay, reconstructions do not."""
    tiny_tokenizer().save_pretrained(tmp_path / "start")
    recipe = recipe_with(
        digits,
        tmp_path / "out",
        init=str(tmp_path / "start"),
        trained="decoder",
        steps=3,
        lr=1e-2,
        ema_decay=0.5,
    )
    train_tokenizer(recipe, quiet=True)
    before = ImageTokenizer.from_pretrained(tmp_path / "start")
    after = ImageTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    for part in ("encoder", "quant_conv", "quantize"):
        old, new = (getattr(model, part).state_dict() for model in (before, after))
        assert all(torch.equal(new[name], value) for name, value in old.items())
    images = torch.rand(2, 3, 24, 24) * 2 - 1
    assert torch.equal(before.encode(images), after.encode(images))
    codes = before.encode(images)
    assert not torch.allclose(before.decode(codes), after.decode(codes), atol=1e-3)


def test_a_decoder_needs_codes_that_stay(digits, tmp_path):
    with pytest.raises(InputError, match="no tokenizer whose codes stay"):
        train_tokenizer(recipe_with(digits, tmp_path, trained="decoder"), quiet=True)
    with pytest.raises(InputError, match="revive_codes_every is 5"):
        recipe_with(digits, tmp_path, trained="decoder", revive_codes_every=5)
    with pytest.raises(InputError, match="trained is 'encoder'"):
        recipe_with(digits, tmp_path, trained="encoder")
