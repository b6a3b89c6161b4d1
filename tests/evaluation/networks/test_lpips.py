"""LPIPS with small random weights: distances and gradients. Its files: ``test_lpips_weights``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llamagen.evaluation.networks.lpips import Lpips
from tests.evaluation.networks.helpers import (
    LPIPS_CONVOLUTIONS,
    LPIPS_HEADS,
    lpips_shapes,
    one_line,
)


def small(seed: int = 0) -> Lpips:
    torch.manual_seed(seed)
    model = Lpips(widths=(4, 6, 4, 6, 5))
    for name, weight in model.named_parameters():
        # With torch's own first values hardly anything would reach the last stages.
        if weight.ndim == 4 and name.startswith("features"):
            nn.init.kaiming_normal_(weight)
        elif name.startswith("lin"):
            nn.init.uniform_(weight, 0.0, 1.0)
    return model


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_keys_equal_those_of_the_public_files():
    with torch.device("meta"):
        model = Lpips()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == lpips_shapes()
    assert sum(p.numel() for p in model.parameters()) == 14_714_688 + sum(LPIPS_HEADS)


@torch.no_grad()
def test_only_equal_images_have_distance_zero():
    model = small()
    a, b = images(3, 3, 32, 40), images(3, 3, 32, 40, seed=1)
    assert model(a, a).tolist() == [0.0, 0.0, 0.0]
    there, back = model(a, b), model(b, a)
    assert there.shape == (3,)
    assert there.dtype == torch.float32
    assert (there > 0).all()
    torch.testing.assert_close(there, back)
    # Every image counts for itself.
    torch.testing.assert_close(model(a[1:2], b[1:2]), there[1:2])


@torch.no_grad()
def test_distance_grows_with_noise():
    model = small()
    a, noise = images(4, 3, 48, 48), torch.randn(4, 3, 48, 48)
    distances = torch.stack([model(a + s * noise, a) for s in (0.0, 0.02, 0.1, 0.4)])
    assert (distances.diff(dim=0) > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (19, 35)])
def test_matches_a_direct_computation(size):
    model = small(seed=3)
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    a, b = images(2, 3, *size), images(2, 3, *size, seed=1)
    expected = [
        direct_distance(weights, x.double().numpy(), y.double().numpy())
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(model(a, b).numpy(), expected, rtol=1e-4)


def direct_distance(weights: dict[str, np.ndarray], a: np.ndarray, b: np.ndarray) -> float:
    """LPIPS of two images (3, H, W), in numpy and as the paper writes it."""
    total = 0.0
    for i, (x, y) in enumerate(
        zip(direct_features(weights, a), direct_features(weights, b), strict=True)
    ):
        x, y = (v / np.linalg.norm(v, axis=0).clip(1e-10) for v in (x, y))
        head = weights[f"lin{i}.model.1.weight"].reshape(-1, 1, 1)
        total += (head * (x - y) ** 2).sum(0).mean()
    return total


def direct_features(weights: dict[str, np.ndarray], image: np.ndarray) -> list[np.ndarray]:
    shift = np.array([-0.030, -0.088, -0.188]).reshape(3, 1, 1)
    scale = np.array([0.458, 0.448, 0.450]).reshape(3, 1, 1)
    x = (image - shift) / scale
    taps = []
    for index in LPIPS_CONVOLUTIONS:
        if index in (5, 10, 17, 24):
            height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
            x = x[:, :height, :width].reshape(len(x), height // 2, 2, width // 2, 2).max((2, 4))
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
        x = np.einsum("chwij,ocij->ohw", windows, weights[f"features.{index}.weight"])
        x = np.maximum(x + weights[f"features.{index}.bias"].reshape(-1, 1, 1), 0.0)
        if index in (2, 7, 14, 21, 28):
            taps.append(x)
    return taps


def test_only_images_get_gradients():
    model = small()
    a = images(2, 3, 24, 24).requires_grad_()
    model(a, images(2, 3, 24, 24, seed=1)).mean().backward()
    assert a.grad.isfinite().all()
    assert a.grad.any()
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    # Down the gradient the images come closer.
    b = images(2, 3, 24, 24, seed=1)
    assert (model(a - 1e-3 * a.grad / a.grad.std(), b) < model(a, b)).all()


def test_gradients_are_finite_at_zero_features():
    """Positions at which all features are 0 have no direction."""
    model = small()
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.constant_(weight, -0.2)
    a = torch.zeros(1, 3, 32, 32)
    a[..., 16:] = images(1, 3, 32, 16)
    assert any((x == 0).all(1).any() for x in model._features(a))
    for b in (a.clone(), torch.zeros_like(a), images(1, 3, 32, 32, seed=1)):
        x = a.clone().requires_grad_()
        distance = model(x, b).sum()
        distance.backward()
        assert distance.isfinite()
        assert x.grad.isfinite().all()
    # Where every image looks the same, nothing pulls.
    model.features[0].weight.zero_()
    x = a.clone().requires_grad_()
    model(x, images(1, 3, 32, 32)).sum().backward()
    assert not x.grad.any()


@torch.no_grad()
def test_train_keeps_eval_mode():
    parent = nn.Module()
    parent.lpips = small()
    a, b = images(2, 3, 16, 16), images(2, 3, 16, 16, seed=1)
    before = parent.lpips(a, b)
    for switch in (parent.train, parent.lpips.train, lambda: parent.lpips.train(True)):
        switch()
        assert not any(module.training for module in parent.lpips.modules())
        # What dropout would change from call to call.
        assert torch.equal(parent.lpips(a, b), before)
        assert torch.equal(parent.lpips(a, b), before)
    assert parent.training
    assert parent.lpips.train() is parent.lpips
    assert not any("Dropout" in type(module).__name__ for module in parent.lpips.modules())
    assert not any(p.requires_grad for p in parent.parameters())


@torch.no_grad()
def test_autocast_changes_distances_little():
    model = small()
    a, b = images(2, 3, 32, 32), images(2, 3, 32, 32, seed=1)
    exact = model(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(a, a).tolist() == [0.0, 0.0]
        rough = model(a, b)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0)


def test_rejects_small_or_different_images():
    model = small()
    text = one_line(model, torch.zeros(2, 3, 15, 16), torch.zeros(2, 3, 15, 16))
    assert "images of 16x15 pixels are too small" in text
    assert "at least 16" in text
    assert "perceptual_weight 0" in text
    for shape in ((1, 3, 16, 16), (2, 1, 16, 16), (2, 3, 16, 18)):
        assert "shape (2, 3, 16, 16)" in one_line(
            model, torch.zeros(2, 3, 16, 16), torch.zeros(shape)
        )
    assert "(B, 3, H, W)" in one_line(model, torch.zeros(2, 1, 16, 16), torch.zeros(2, 1, 16, 16))
