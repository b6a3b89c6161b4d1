"""What runs tell TensorBoard and wandb, and how fast they say they are."""

import sys
import types

import pytest
import torch

from llamagen.config import TRANSFORMER_PRESETS, TransformerConfig
from llamagen.models.transformer import Transformer
from llamagen.support.errors import InputError
from llamagen.training import train_tokenizer, train_transformer
from llamagen.training.metrics import peak_flops, training_flops
from llamagen.training.trackers import TRACKERS
from tests.training.runs import tokenizer_recipe, transformer_recipe


def test_tensorboard_has_the_numbers_and_the_pictures(digits, tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    recipe = tokenizer_recipe(
        digits, tmp_path / "run", trackers=("tensorboard",), sample_every=2, log_every=1
    )
    result = train_tokenizer(recipe, quiet=True)
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert sorted(losses) == [1, 2, 3, 4]
    assert losses[4] == pytest.approx(result.train["loss"])
    assert [event.step for event in events.Scalars("validation/psnr")] == [2, 4]
    assert [event.step for event in events.Images("samples")] == [2, 4]


class Wandb(types.ModuleType):
    """As much of wandb as a run uses."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.finished = [], [], 0
        self.util = types.SimpleNamespace(generate_id=lambda: "abc")
        self.Image = str

    def init(self, **arguments):
        self.started.append(arguments)
        return self

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


def test_wandb_resumes_the_same_run(digits, tokenizer_folder, tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for steps in (2, 4):
        recipe = transformer_recipe(
            digits, tokenizer_folder, tmp_path / "run", trackers=("wandb",), log_every=1,
            steps=steps, sample_every=4,
        )  # fmt: skip
        train_transformer(recipe, quiet=True)
    assert [start["id"] for start in wandb.started] == ["abc", "abc"]
    assert wandb.started[0]["config"]["loop"]["batch_size"] == 4
    assert wandb.finished == 2
    losses = [line["step"] for line in wandb.logged if "train/loss" in line]
    assert losses == [1, 2, 3, 4]
    pictures = [line["samples"] for line in wandb.logged if "samples" in line]
    assert pictures[-1].endswith("step-0000004.png")


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_missing_packages_are_named(name, tmp_path, monkeypatch):
    module = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard.writer"}[name]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=f"tracker {name} needs a package .* pip install"):
        TRACKERS[name](tmp_path, {})


def test_flops_are_six_per_weight_and_position_and_the_attention():
    config = TRANSFORMER_PRESETS["B"]
    with torch.device("meta"):
        model = Transformer(config)
    matrices = sum(
        p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embedding" not in name
    )
    attention = 12 * config.layers * config.dim * 256**2
    assert training_flops(config) == 6 * matrices * 256 + attention


def test_peak_is_known_for_some_devices(monkeypatch):
    assert peak_flops(torch.device("cpu"), "bfloat16") is None
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA L40S": 362e12, "NVIDIA L4": 121e12}
    names |= {"NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A10": 125e12, "Quadro P400": None}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(torch.device("cuda"), "bfloat16") == peak
        assert peak_flops(torch.device("cuda"), "float32") is None


@pytest.mark.slow
def test_compiled_blocks_train_to_the_same_losses(digits, tokenizer_folder, tmp_path):
    losses = {}
    # Compiled code draws other random numbers, so there must be none.
    plain = TransformerConfig(
        dim=32, layers=2, heads=2, hidden_dim=64,
        token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0,
    )  # fmt: skip
    for compiled in (False, True):
        recipe = transformer_recipe(
            digits, tokenizer_folder, tmp_path / str(compiled), compile=compiled, model=plain
        )
        losses[compiled] = train_transformer(recipe, quiet=True)
    assert "loss" in losses[False].validation
    for name, value in losses[False].validation.items():
        assert losses[True].validation[name] == pytest.approx(value, rel=1e-4)
