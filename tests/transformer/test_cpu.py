import pytest
import torch
import torch.nn.functional as F

from llamagen.config import TransformerConfig
from llamagen.transformer import Transformer, cpu


def test_dropout_keeps_the_rate_and_the_mean():
    torch.manual_seed(0)
    dropout = cpu.Dropout(0.3).train()
    out = dropout(torch.ones(1001, 501))
    values = out.unique()
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / 0.7]))
    # Four standard deviations of half a million decisions.
    rate, tolerance = (out == 0).float().mean().item(), 4 * (0.21 / out.numel()) ** 0.5
    assert rate == pytest.approx(0.3, abs=tolerance)
    # Neither rows nor neighbours share their decisions.
    kept = (out != 0).float() - 0.7
    assert (kept[:, 1:] * kept[:, :-1]).mean().abs() < 2e-3
    assert (kept[1:] * kept[:-1]).mean().abs() < 2e-3


def test_dropout_follows_the_seed_and_its_gradient_the_mask():
    dropout = cpu.Dropout(0.5).train()
    x = torch.ones(7, 3, requires_grad=True)
    torch.manual_seed(1)
    first = dropout(x)
    torch.manual_seed(1)
    assert torch.equal(first, dropout(x))
    assert not torch.equal(first, dropout(x))
    (grad,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(grad, first)


def test_dropout_is_off_in_evaluation_and_at_zero():
    x = torch.randn(5, 5)
    assert torch.equal(cpu.Dropout(0.5).eval()(x), x)
    assert torch.equal(cpu.Dropout(0.0).train()(x), x)
    assert not cpu.Dropout(1.0).train()(x).any()


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (2, 3, 17, 8)])
def test_attention_gradients_are_those_of_finite_differences(shape):
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(cpu.causal_attention, inputs)


def test_attention_in_chunks_equals_fused_attention(monkeypatch):
    monkeypatch.setattr(cpu, "_CHUNK_SCORES", 4 * 19 * 19)
    torch.manual_seed(0)
    inputs = [torch.randn(3, 5, 19, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    ours = cpu.causal_attention(*inputs)
    theirs = F.scaled_dot_product_attention(*inputs, is_causal=True)
    torch.testing.assert_close(ours, theirs)
    slope = torch.randn_like(ours)
    got = torch.autograd.grad(ours, inputs, slope)
    wanted = torch.autograd.grad(theirs, inputs, slope)
    for own, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(own, other)


def test_attention_in_bfloat16_is_about_as_precise_as_fused_attention():
    torch.manual_seed(0)
    exact = [torch.randn(2, 4, 64, 32, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    slope = torch.randn(2, 4, 64, 32, dtype=torch.float64)

    def results(attention, inputs):
        out = attention(*inputs)
        return [out, *torch.autograd.grad(out, inputs, slope.to(out.dtype))]

    def fused(*inputs):
        return F.scaled_dot_product_attention(*inputs, is_causal=True)

    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    right = results(fused, [x.detach().double().requires_grad_() for x in half])
    ours, theirs = results(cpu.causal_attention, half), results(fused, half)
    for truth, own, other in zip(right, ours, theirs, strict=True):
        assert (own - truth).abs().mean() < 2 * (other - truth).abs().mean()


def test_training_in_bfloat16_takes_this_way_and_gets_the_same_losses(monkeypatch):
    config = TransformerConfig(
        dim=64, layers=2, heads=4, codebook_size=32, num_classes=4, grid=(4, 4),
        token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(config).train()
    codes, labels = torch.randint(32, (3, 16)), torch.tensor([0, 1, 2])
    called = []
    own = cpu.causal_attention
    monkeypatch.setattr(cpu, "causal_attention", lambda *a: called.append(1) or own(*a))

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return model(codes[:, :-1], labels, targets=codes)

    ours = loss()
    assert len(called) == 2
    monkeypatch.setattr(cpu, "plain_attention_pays", lambda *_: False)
    assert ours.item() == pytest.approx(loss().item(), rel=1e-3)
    assert len(called) == 2
