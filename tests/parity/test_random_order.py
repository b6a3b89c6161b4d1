"""A transformer of random order reproduces RandAR's logits, loss, passes and greedy codes."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from llamagen.checkpoints import find_public
from llamagen.checkpoints.load import infer_transformer_config
from llamagen.checkpoints.published import Checkpoint
from llamagen.config import SamplingConfig
from llamagen.generation import batch, generate_codes
from llamagen.generation.schedules.parallel import ParallelSchedule, group_sizes
from llamagen.models.transformer import Transformer
from tests.parity.test_transformer import model_of


@pytest.fixture
def case(read_case):
    return read_case("gpt_c2i_random_tiny")


def test_group_sizes(fixtures):
    expected = json.loads((fixtures / "parallel_schedule.json").read_text())
    assert expected
    for key, sizes in expected.items():
        total, steps = map(int, key.split("/"))
        assert group_sizes(total, steps) == sizes


@torch.no_grad()
def test_logits_and_loss(case):
    model, order = model_of(case), case.tensor("order")
    codes = case.tensor("tokens").gather(1, order)
    logits = model(codes[:, :-1], case.tensor("labels"), order=order)
    torch.testing.assert_close(logits, case.tensor("logits"), rtol=1e-4, atol=1e-4)
    loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
    assert loss.item() == pytest.approx(case.info["loss"], rel=1e-5)


@pytest.mark.parametrize("number", range(6))
def test_greedy_codes(case, monkeypatch, number):
    model, orders = model_of(case), case.tensor("order").tolist()
    about = case.info["generate"][number]
    steps = None if about["steps"] < 0 else about["steps"]
    sizes = group_sizes(36, 36 if steps is None else steps)
    assert sizes == about["group_sizes"]
    start, end = about["cfg_scales"]
    sampling = SamplingConfig(
        guidance_schedule="linear", guidance_start=start, guidance_scale=end, temperature=0.0
    )
    monkeypatch.setattr(
        batch,
        "new_schedule",
        lambda request, *_, **__: ParallelSchedule(orders[request.seed], sizes),
    )
    codes = generate_codes(model, case.tensor("labels"), seeds=range(4), sampling=sampling)
    assert torch.equal(codes.flatten(1), case.tensor(about["array"]).long())


def test_published_architectures(fixtures):
    published = json.loads((fixtures / "random_order_checkpoint_shapes.json").read_text())
    assert sorted(published) == ["randar-L-256", "randar-XL-256"]
    for name, about in published.items():
        config = find_public(name).config
        with torch.device("meta"):
            model = Transformer(config)
        shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
        assert shapes == about["shapes"]
        assert model.parameter_count() == about["parameters"]
        file = Checkpoint(
            source="a.safetensors",
            kind="transformer",
            shapes={key: tuple(shape) for key, shape in about["shapes"].items()},
            arguments={},
            tensors=(),
        )
        assert infer_transformer_config(file) == config
