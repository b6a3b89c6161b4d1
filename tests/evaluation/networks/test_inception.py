"""Inception-v3 against a second, plain computation."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from llamagen.evaluation.networks import inception
from llamagen.evaluation.networks.inception import WEIGHTS_FILE, InceptionV3, resize_bilinear
from llamagen.support.storage import cache_folder
from tests.evaluation.networks.helpers import images, one_line, shapes
from tests.evaluation.networks.plain_inception import (
    Reference,
    plain_average,
    plain_maximum,
    plain_resize,
)

PUBLIC_SHAPES = {
    "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
    "Conv2d_1a_3x3.bn.weight": (32,),
    "Conv2d_1a_3x3.bn.bias": (32,),
    "Conv2d_1a_3x3.bn.running_mean": (32,),
    "Conv2d_1a_3x3.bn.running_var": (32,),
    "Conv2d_3b_1x1.conv.weight": (80, 64, 1, 1),
    "Conv2d_4a_3x3.conv.weight": (192, 80, 3, 3),
    "Mixed_5b.branch1x1.conv.weight": (64, 192, 1, 1),
    "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
    "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
    "Mixed_5c.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
    "Mixed_5d.branch_pool.conv.weight": (64, 288, 1, 1),
    "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
    "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
    "Mixed_6c.branch7x7dbl_4.conv.weight": (160, 160, 7, 1),
    "Mixed_6d.branch1x1.conv.weight": (192, 768, 1, 1),
    "Mixed_6e.branch7x7_3.conv.weight": (192, 192, 7, 1),
    "Mixed_7a.branch3x3_2.conv.weight": (320, 192, 3, 3),
    "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
    "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
    "Mixed_7b.branch3x3dbl_1.conv.weight": (448, 1280, 1, 1),
    "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
    "Mixed_7c.branch_pool.bn.running_var": (192,),
    "fc.weight": (1008, 2048),
    "fc.bias": (1008,),
}


# The architecture


def test_keys_equal_those_of_the_public_file():
    found = shapes()
    assert {name: found[name] for name in PUBLIC_SHAPES} == PUBLIC_SHAPES
    assert sum(name.endswith(".conv.weight") for name in found) == 94
    assert len(found) == 94 * 5 + 2
    trained = [s for name, s in found.items() if "running" not in name]
    # As torchvision's, which has 1000 outputs: 23,834,568.
    assert sum(int(np.prod(s)) for s in trained) == 23_834_568 + 8 * 2049


@torch.no_grad()
def test_matches_a_plain_computation(network):
    batch = images(301, 250)
    found = network(batch)
    assert [tuple(each.shape) for each in found] == [(2, 2048), (2, 2023), (2, 1008)]
    assert {each.dtype for each in found} == {torch.float32}
    reference = Reference(network.state_dict())
    for feature, expected in zip(found, reference(batch[1].numpy()), strict=True):
        assert expected.std() > 0.1
        np.testing.assert_allclose(feature[1].numpy(), expected, rtol=1e-3, atol=1e-3)
    unused = set(network.state_dict()) - reference.used
    assert unused == {"fc.bias"}


@pytest.mark.parametrize(
    ("size", "side"),
    [((32, 32), 149), ((40, 23), 61), ((97, 130), 61), ((61, 61), 61), ((1, 2), 5)],
)
def test_resizing_matches_a_plain_computation(size, side):
    batch = images(*size).float()
    found = resize_bilinear(batch, side)
    for image, resized in zip(batch.numpy(), found.numpy(), strict=True):
        np.testing.assert_array_equal(resized, plain_resize(image, side))


def test_resizing_has_no_half_pixel_centres():
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    # Pixel i of 8 is at i / 2, and what lies beyond the last old pixel is like it.
    assert resize_bilinear(ramp, 8)[0, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]
    assert resize_bilinear(ramp, 2)[0, 0, 0].tolist() == [0, 2]


def test_pooling_leaves_padding_out():
    x = torch.rand(2, 3, 5, 4, dtype=torch.float64) - 2
    torch.testing.assert_close(inception._average(x), plain_average(x))
    torch.testing.assert_close(inception._maximum(x), plain_maximum(x))
    ones = torch.ones(1, 1, 3, 3)
    assert torch.equal(inception._average(ones), ones)


def test_spatial_features_are_positions_by_channels(network):
    kept = []
    handle = network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: kept.append(call[2]))
    spatial = network(images(20, 20)).spatial
    handle.remove()
    assert kept[0].shape == (2, 192, 17, 17)
    grid = spatial.view(2, 17, 17, 7)
    for channel in range(7):
        assert torch.equal(grid[..., channel], kept[0][:, channel])
    assert (spatial >= 0).all()
    # It does not keep the whole block's output in memory.
    assert spatial.untyped_storage().nbytes() == 4 * spatial.numel()


def test_logits_have_no_bias(network):
    assert network.fc.bias.abs().max() > 0.1
    features = network(images(20, 20))
    torch.testing.assert_close(features.logits, features.pool @ network.fc.weight.T)
    torch.testing.assert_close(features.probabilities.sum(1), torch.ones(2))
    powers = features.logits.double().exp()
    expected = (powers / powers.sum(1, keepdim=True)).float()
    torch.testing.assert_close(features.probabilities, expected)


def test_features_do_not_depend_on_the_batch(network):
    batch = images(48, 32, count=3)
    together = network(batch)
    alone = network(batch[1:2])
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[1:2], b, rtol=1e-4, atol=1e-4)
    # In another layout of memory too.
    other = network(batch.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(other.pool, together.pool)
    assert [len(each) for each in network(batch[:0])] == [0, 0, 0]


def test_train_and_autocast_have_no_effect(network):
    batch = images(16, 16, count=1)
    before = network(batch)
    network.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        after = network(batch)
    network.eval()
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
        assert not b.requires_grad
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(2, 3, 8, 8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
        torch.zeros(2, 3, 0, 8, dtype=torch.uint8),
    ],
)
def test_rejects_other_images(network, batch):
    text = one_line(network, batch)
    assert str(tuple(batch.shape)) in text
    assert "give uint8 of shape (B, 3, H, W)" in text


def test_tf32_is_restored():
    before = torch.backends.cudnn.allow_tf32
    with pytest.raises(KeyError), inception._exact_convolutions(torch.device("cuda")):
        raise KeyError
    assert torch.backends.cudnn.allow_tf32 == before
    with inception._exact_convolutions(torch.device("cpu")):
        assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.gpu
def test_gpu_matches_cpu(network):
    batch = images(64, 64)
    here = network(batch)
    before = torch.backends.cudnn.allow_tf32
    there = network.to("cuda")(batch.cuda())
    network.to("cpu")
    assert torch.backends.cudnn.allow_tf32 == before
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-3, atol=1e-3)


# The public file itself, where it is


@pytest.fixture(scope="module")
def real() -> InceptionV3:
    places = [
        Path(os.environ.get("LLAMAGEN_TEST_INCEPTION", "absent")),
        cache_folder() / WEIGHTS_FILE.name,
        Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE.name,
    ]
    for path in places:
        if path.is_file():
            return InceptionV3.from_weights(path)
    pytest.skip(f"needs {WEIGHTS_FILE.name}; LLAMAGEN_TEST_INCEPTION says where it is")


def photographs() -> Tensor:
    """A cat and a cup of coffee, both 300 pixels high."""
    data = pytest.importorskip("skimage.data")
    pair = [torch.from_numpy(image[:300, :400].copy()) for image in (data.chelsea(), data.coffee())]
    return torch.stack(pair).movedim(-1, 1)


def test_real_weights_recognise_things(real):
    batch = photographs()
    features = real(batch)
    probabilities = (features.logits + real.fc.bias).softmax(1)
    best = probabilities.argmax(1)
    assert best[0] != best[1]
    assert (probabilities.amax(1) > 0.2).all()
    # These outputs stand for nothing.
    assert (probabilities[:, [0, *range(1001, 1008)]].sum(1) < 0.01).all()
    mirrored = real(batch.flip(-1))
    assert torch.equal((mirrored.logits + real.fc.bias).argmax(1), best)
    # Mirrored they are closer to themselves than to each other.
    distances = torch.cdist(features.pool, mirrored.pool)
    assert (distances.argmin(1) == torch.arange(2)).all()


def test_real_weights_match_a_plain_computation(real):
    batch = photographs()[:1]
    expected = Reference(real.state_dict())(batch[0].numpy())
    for found, value in zip(real(batch), expected, strict=True):
        np.testing.assert_allclose(found[0].numpy(), value, rtol=1e-3, atol=1e-3)
