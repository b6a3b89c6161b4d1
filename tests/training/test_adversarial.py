import math

import pytest
import torch
import torch.nn.functional as F

from llamagen.training.adversarial import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)

REAL = torch.tensor([[2.0, 0.5], [-1.0, 0.0]])
FAKE = torch.tensor([-3.0, 0.0, 0.5])


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_hinge_in_closed_form():
    # Real: 0, 0.5, 2, 1. Fake: 0, 1, 1.5.
    loss = discriminator_loss("hinge", REAL, FAKE)
    assert float(loss) == pytest.approx(0.5 * (3.5 / 4 + 2.5 / 3))
    assert float(generator_loss("hinge", FAKE)) == pytest.approx(2.5 / 3)
    # Beyond the margin nothing is left to learn.
    assert float(discriminator_loss("hinge", torch.tensor(1.5), torch.tensor(-1.0))) == 0.0


@pytest.mark.parametrize("kind", ["vanilla", "non-saturating"])
def test_cross_entropy_in_closed_form(kind):
    real = sum(softplus(-x) for x in REAL.flatten().tolist()) / 4
    fake = sum(softplus(x) for x in FAKE.tolist()) / 3
    assert float(discriminator_loss(kind, REAL, FAKE)) == pytest.approx(0.5 * (real + fake))
    expected = sum(softplus(-x) for x in FAKE.tolist()) / 3
    assert float(generator_loss(kind, FAKE)) == pytest.approx(expected)
    # Logits and targets in their places, which the published code swaps.
    real = F.binary_cross_entropy_with_logits(REAL, torch.ones_like(REAL))
    fake = F.binary_cross_entropy_with_logits(FAKE, torch.zeros_like(FAKE))
    torch.testing.assert_close(discriminator_loss(kind, REAL, FAKE), 0.5 * (real + fake))


@pytest.mark.parametrize("kind", ["hinge", "vanilla", "non-saturating"])
def test_directions_and_extremes(kind):
    real = torch.tensor([-200.0, 0.3, 200.0], requires_grad=True)
    fake = torch.tensor([-200.0, 0.3, 200.0], requires_grad=True)
    loss = discriminator_loss(kind, real, fake)
    loss.backward()
    assert loss.isfinite()
    assert (real.grad <= 0).all()
    assert (fake.grad >= 0).all()
    # Where the discriminator is most wrong it learns most, where it is right nothing.
    assert float(real.grad[0]) == pytest.approx(-0.5 / 3)
    assert float(real.grad[2]) == 0.0
    fake.grad = None
    generator_loss(kind, fake).backward()
    # The other side learns most where the discriminator is sure: it does not saturate.
    assert float(fake.grad[0]) == pytest.approx(-1 / 3)
    assert (fake.grad <= 0).all()


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
def test_half_precision_is_averaged_in_float32(kind):
    logits = torch.full((1000,), 0.1, dtype=torch.bfloat16)
    exact = logits.double()
    for loss, expected in (
        (discriminator_loss(kind, logits, logits), discriminator_loss(kind, exact, exact)),
        (generator_loss(kind, logits), generator_loss(kind, exact)),
    ):
        assert loss.dtype == torch.float32
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_adaptive_weight_of_quadratics():
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    # The gradients are 2 w and 0.1 w, of norms 10 and 0.5.
    reconstruction, generator = w.square().sum(), 0.05 * w.square().sum()
    weight = adaptive_weight(reconstruction, generator, w)
    assert float(weight) == pytest.approx(10 / (0.5 + 1e-4), rel=1e-6)
    assert not weight.requires_grad
    assert w.grad is None
    # The graphs are still there, and with the weight both sides pull alike.
    (reconstruction + weight * generator).backward()
    torch.testing.assert_close(w.grad, 4 * w.detach(), rtol=1e-3, atol=0)


def test_adaptive_weight_at_its_limits():
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    some, none = w.square().sum(), 0.0 * w.sum()
    assert float(adaptive_weight(1e6 * some, 1e-6 * some, w)) == 1e4
    assert float(adaptive_weight(some, none, w)) == 1e4
    assert float(adaptive_weight(none, some, w)) == 0.0
    assert float(adaptive_weight(some, -some, w)) == pytest.approx(1.0, rel=1e-4)


def test_adaptive_weight_looks_at_the_last_layer_only():
    torch.manual_seed(0)
    body, last = torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)
    x = torch.randn(5, 4)
    out = last(body(x).tanh())
    reconstruction, generator = (out - 1).square().mean(), -out.mean()
    weight = adaptive_weight(reconstruction, generator, last.weight)
    norms = [
        torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm()
        for loss in (reconstruction, generator)
    ]
    torch.testing.assert_close(weight, norms[0] / (norms[1] + 1e-4))
    assert all(p.grad is None for p in (*body.parameters(), *last.parameters()))
