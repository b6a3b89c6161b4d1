import dataclasses

import pytest

from llamagen.config import (
    TOKENIZER_PRESETS,
    TRANSFORMER_PRESETS,
    TransformerArchitecture,
    TransformerConfig,
)
from llamagen.support.errors import InputError
from llamagen.training import LoopConfig, TokenizerTraining, TransformerTraining, load_recipe
from llamagen.training.config import (
    AugmentationConfig,
    ImageConfig,
    TokenizerLossConfig,
)
from llamagen.training.optimizer import learning_rate, make_optimizer
from llamagen.training.recipes import preset_model, recipe_names, recipe_to_yaml
from tests.tiny_models import tiny_transformer


@pytest.fixture
def recipe(tmp_path):
    def load(text, cls=TokenizerTraining):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return load_recipe(cls, path)

    return load


def test_fields_left_out_have_the_stage_s_defaults(recipe):
    loaded = recipe("loop:\n  steps: 7\n", TransformerTraining)
    assert loaded.loop == LoopConfig(steps=7, batch_size=256, weight_decay=0.05)
    assert loaded == dataclasses.replace(TransformerTraining(), loop=loaded.loop)


def test_numbers_as_people_write_them(recipe):
    loaded = recipe("loop: {lr: 1e-4, weight_decay: 5.E-2, clip_norm: 1, ema_decay: .5e-1}")
    loop = loaded.loop
    assert (loop.lr, loop.weight_decay, loop.clip_norm, loop.ema_decay) == (1e-4, 0.05, 1, 0.05)


@pytest.mark.parametrize(
    ("text", "cls", "expected"),
    [
        ("model: vq-8", TokenizerTraining, TOKENIZER_PRESETS["VQ-8"]),
        (
            "model: {preset: VQ-8, codebook_size: 99}",
            TokenizerTraining,
            dataclasses.replace(TOKENIZER_PRESETS["VQ-8"], codebook_size=99),
        ),
        ("model: L", TransformerTraining, TransformerArchitecture(dim=1024, layers=24, heads=16)),
    ],
)
def test_presets(recipe, text, cls, expected):
    assert recipe(text, cls).model == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loop: {stepz: 7}", "stepz"),
        ("stepz: 7", "stepz"),
        ("loop: {steps: many}", "steps"),
        ("loop: 7", "loop is 7, expected fields below it"),
        ("loop: {steps: 0}", "steps is 0, expected at least 1"),
        ("model: VQ-17", "no preset 'VQ-17'; choose one of VQ-16, VQ-8"),
        ("model: [1]", "expected a preset's name or fields"),
        ("- 1", "holds no recipe"),
        ("", "holds no recipe"),
        ("a: [", "is not valid YAML"),
        ("images: {size: 100}", "multiples of the tokenizer's downsampling 16"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
    ],
)
def test_bad_recipes(recipe, text, message):
    with pytest.raises(InputError, match=message) as caught:
        recipe(text)
    assert "recipe.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_names(tmp_path):
    with pytest.raises(InputError, match=r"no recipe 'imagnet'; .* digits-tokenizer"):
        load_recipe(TokenizerTraining, "imagnet")
    with pytest.raises(FileNotFoundError, match=r"my\.yaml does not exist"):
        load_recipe(TokenizerTraining, tmp_path / "my.yaml")


def recipe_class(name):
    is_tokenizer = name.startswith("vq-") or name.endswith(("tokenizer", "decoder"))
    return TokenizerTraining if is_tokenizer else TransformerTraining


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_load(name):
    recipe = load_recipe(recipe_class(name), name)
    assert recipe.data is None
    # Images are many or few, batches fit the processes of one machine.
    assert recipe.loop.batch_size % 8 == 0


PUBLISHED_STEPS = {128: 40 * 1_281_167 / 128, 256: 300 * 1_281_167 / 256}


@pytest.mark.parametrize("name", ["vq-16", "vq-8"])
def test_published_tokenizers(name):
    recipe = load_recipe(TokenizerTraining, name)
    assert recipe.model == TOKENIZER_PRESETS[name.upper()]
    loop, losses, judged = recipe.loop, recipe.loss, recipe.adversarial
    assert (loop.batch_size, loop.lr, loop.betas, loop.clip_norm) == (128, 1e-4, (0.9, 0.95), 1.0)
    assert (loop.schedule, loop.weight_decay, loop.precision) == ("constant", 0.0, "bfloat16")
    assert loop.steps == pytest.approx(PUBLISHED_STEPS[128], abs=1)
    assert (losses.reconstruction, losses.commitment_weight) == ("l2", 0.25)
    assert recipe.perceptual.perceptual_weight == 1.0
    assert (judged.adversarial_weight, judged.adversarial_start) == (0.5, 20000)
    assert (judged.discriminator, judged.adversarial_loss) == ("patchgan", "hinge")
    assert recipe.images.shape == (256, 256)
    assert recipe.augmentation.crop_scale == 1 / 0.8


@pytest.mark.parametrize("size", [256, 384])
@pytest.mark.parametrize("name", ["B", "L", "XL", "XXL", "3B"])
def test_published_transformers(name, size):
    recipe = load_recipe(TransformerTraining, f"c2i-{name}-{size}")
    grid = TOKENIZER_PRESETS["VQ-16"].grid_of(*recipe.images.shape)
    assert grid == (size // 16, size // 16)
    config = TransformerConfig(
        **vars(recipe.model), codebook_size=16384, grid=grid, num_classes=recipe.num_classes
    )
    assert config == dataclasses.replace(TRANSFORMER_PRESETS[name], grid=grid)
    assert (config.token_dropout, config.residual_dropout, config.ffn_dropout) == (0.1, 0.1, 0.1)
    loop = recipe.loop
    assert (loop.batch_size, loop.lr, loop.betas, loop.clip_norm) == (256, 1e-4, (0.9, 0.95), 1.0)
    assert (loop.schedule, loop.weight_decay, loop.precision) == ("constant", 0.05, "bfloat16")
    assert loop.steps == pytest.approx(PUBLISHED_STEPS[256], abs=1)
    assert loop.parallel == ("fsdp" if name in ("XXL", "3B") else "ddp")
    assert (recipe.tokenizer, recipe.views, recipe.condition_dropout) == ("vq-16", "ten-crop", 0.1)


@pytest.mark.parametrize("cls", [TokenizerTraining, TransformerTraining])
def test_yaml_round_trip(recipe, cls, tmp_path):
    before = dataclasses.replace(cls(), data=str(tmp_path / "images"), out=tmp_path / "out")
    assert recipe(recipe_to_yaml(before), cls) == before


def test_preset_model_is_the_preset():
    for name, config in TRANSFORMER_PRESETS.items():
        assert TransformerConfig(**vars(preset_model(TransformerTraining, name))) == config


def test_complete_configuration_gives_its_architecture():
    recipe = TransformerTraining(model=TRANSFORMER_PRESETS["L"])
    assert recipe == TransformerTraining(model=TRANSFORMER_PRESETS["L"].architecture)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoopConfig(batch_size=6, gradient_accumulation=4), "does not divide batch_size 6"),
        (lambda: LoopConfig(precision="float16"), "float16 cannot be trained with.*use bfloat16"),
        (lambda: LoopConfig(precision="int8"), "expected one of auto, float32, bfloat16"),
        (lambda: LoopConfig(lr=0.0), "lr is 0.0"),
        (lambda: LoopConfig(lr=float("nan")), "lr is nan"),
        (lambda: LoopConfig(betas=(0.9, 1.0)), "betas is"),
        (lambda: LoopConfig(ema_decay=1.0), "ema_decay is 1.0"),
        (lambda: LoopConfig(seed=-1), "seed is -1"),
        (lambda: LoopConfig(schedule="linear"), "expected one of constant, cosine"),
        (lambda: LoopConfig(save_every=-1), "save_every is -1, expected at least 0"),
        (lambda: ImageConfig(size=0), "size is 0"),
        (lambda: ImageConfig(width=0), "width is 0"),
        (lambda: ImageConfig(workers=-1), "workers is -1"),
        (lambda: ImageConfig(validation_fraction=1.0), "validation_fraction is 1.0"),
        (lambda: AugmentationConfig(crop_scale=0.9), "crop_scale is 0.9"),
        (lambda: TokenizerLossConfig(reconstruction="l3"), "expected one of l2, l1"),
        (lambda: TokenizerLossConfig(commitment_weight=-1.0), "commitment_weight is -1.0"),
        (lambda: TransformerArchitecture(dim=100, heads=12), "dim 100 over 12 heads"),
        (lambda: TransformerTraining(condition_dropout=1.0), "condition_dropout is 1.0"),
        (lambda: TransformerTraining(views="none"), "center, flip, five-crop, ten-crop"),
        (lambda: TransformerTraining(num_classes=0), "num_classes is 0"),
        (lambda: TokenizerTraining(codebook_init="zero"), "expected one of random, data"),
    ],
)
def test_values_that_make_no_sense(make, message):
    with pytest.raises(InputError, match=message):
        make()


class TestLearningRate:
    def test_warm_up(self):
        config = LoopConfig(lr=1.0, warmup_steps=4, steps=10)
        rates = [learning_rate(config, step) for step in range(6)]
        assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]

    def test_cosine(self):
        config = LoopConfig(lr=1.0, warmup_steps=2, steps=12, schedule="cosine")
        rates = [learning_rate(config, step) for step in range(13)]
        assert rates[2] == 1.0
        assert rates[7] == pytest.approx(0.5)
        assert rates[12] == pytest.approx(0.0)
        assert rates[2:] == sorted(rates[2:], reverse=True)

    def test_cosine_to_a_part(self):
        config = LoopConfig(lr=1.0, steps=10, schedule="cosine", min_lr_ratio=0.2)
        rates = [learning_rate(config, step) for step in (0, 5, 10)]
        assert rates == pytest.approx([1.0, 0.6, 0.2])


def test_decay_is_for_matrices_only():
    model = tiny_transformer()
    decayed, free = make_optimizer(model, LoopConfig(weight_decay=0.05), lr=1e-3).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    assert {p.ndim for p in free["params"]} == {1}
    assert all(p.ndim >= 2 for p in decayed["params"])
    count = sum(p.numel() for group in (decayed, free) for p in group["params"])
    assert count == model.parameter_count()


def test_a_model_option_is_a_recipe_field(recipe):
    """What ``TransformerConfig`` has is a field of recipes, but for what the data decides."""
    assert recipe("model: {qk_norm: true}", TransformerTraining).model.qk_norm
    with pytest.raises(InputError, match="grid"):
        recipe("model: {grid: [8, 8]}", TransformerTraining)
