import pytest
import torch
import torch.nn.functional as F

from llamagen.training import losses
from llamagen.training.losses import chunked_cross_entropy as loss_of


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks and a rest, in tests of a few rows, and two products with them."""
    monkeypatch.setattr(losses, "_CHUNK_LOGITS", 3 * 11)
    monkeypatch.setattr(losses, "_CHUNK_GRADS", 5 * 11)


def rows(count=7, width=5, codes=11, dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(count, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(codes, width, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(codes, (count,))


def test_gradients_are_those_of_finite_differences():
    hidden, weight, targets = rows()
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 1.0, 3.0])
    assert torch.autograd.gradcheck(lambda h, w: loss_of(h, w, targets), (hidden, weight))
    assert torch.autograd.gradcheck(lambda h, w: loss_of(h, w, targets, weights), (hidden, weight))


@pytest.mark.parametrize("weighted", [False, True])
def test_equals_the_mean_cross_entropy_of_all_logits(weighted):
    hidden, weight, targets = rows()
    weights = torch.rand(7, dtype=torch.float64) if weighted else torch.ones(7).double()
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    expected = (expected * weights).sum() / weights.sum()
    wanted = torch.autograd.grad(expected, (hidden, weight))
    loss = loss_of(hidden, weight, targets, weights.float() if weighted else None)
    got = torch.autograd.grad(loss * 3, (hidden, weight))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs * 3, rtol=1e-6, atol=1e-8)


def test_huge_logits_stay_finite():
    hidden, weight, targets = rows(dtype=torch.float32)
    loss = loss_of(hidden * 1e4, weight, targets)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(hidden.grad).all()


def test_weights_that_are_all_zero_give_zero():
    hidden, weight, targets = rows(dtype=torch.float32)
    loss = loss_of(hidden, weight, targets, torch.zeros(7))
    loss.backward()
    assert loss.item() == 0.0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_autocast_products_are_bfloat16_and_gradients_float32():
    hidden, weight, targets = rows(count=64, width=32, dtype=torch.float32)
    full = loss_of(hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        half = loss_of(hidden, weight, targets)
    assert half.dtype == torch.float32
    assert half.item() != full.item()
    assert half.item() == pytest.approx(full.item(), rel=1e-2)
    half.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_without_gradients_no_gradient_is_computed():
    hidden, weight, targets = rows()
    with torch.no_grad():
        assert not loss_of(hidden, weight, targets).requires_grad
    loss = loss_of(hidden, weight.detach(), targets)
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is None
