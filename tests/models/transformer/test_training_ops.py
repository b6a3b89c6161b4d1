import pytest
import torch
import torch.nn.functional as F

from llamagen.config import TransformerConfig
from llamagen.models.transformer import Transformer, apply_rope, rope_table, training_ops


def test_dropout_keeps_the_rate_and_the_mean():
    torch.manual_seed(0)
    dropout = training_ops.Dropout(0.3).train()
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
    dropout = training_ops.Dropout(0.5).train()
    x = torch.ones(7, 3, requires_grad=True)
    torch.manual_seed(1)
    first = dropout(x)
    torch.manual_seed(1)
    assert torch.equal(first, dropout(x))
    assert not torch.equal(first, dropout(x))
    (grad,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(grad, first)


@pytest.mark.parametrize("probability", [1e-6, 0.1, 0.3, 0.5, 1 - 1e-6])
def test_dropout_in_bfloat16_makes_the_same_decisions(probability):
    dropout = training_ops.Dropout(probability).train()
    torch.manual_seed(0)
    wide = dropout(torch.ones(301, 7))
    torch.manual_seed(0)
    x = torch.ones(301, 7, dtype=torch.bfloat16, requires_grad=True)
    half = dropout(x)
    assert torch.equal(half, wide.bfloat16())
    (grad,) = torch.autograd.grad(half.sum(), x)
    assert torch.equal(grad, half)


def test_dropout_is_off_in_evaluation_and_at_zero():
    x = torch.randn(5, 5)
    assert torch.equal(training_ops.Dropout(0.5).eval()(x), x)
    assert torch.equal(training_ops.Dropout(0.0).train()(x), x)
    assert not training_ops.Dropout(1.0).train()(x).any()


def norm_inputs(dtype=torch.float64):
    torch.manual_seed(0)
    x = (
        torch.randn(3, 5, 8, dtype=dtype)
        * torch.tensor([1e-3, 1.0, 30.0], dtype=dtype)[:, None, None]
    )
    return x.requires_grad_(), torch.randn(8, dtype=dtype, requires_grad=True)


def test_norm_gradients_are_those_of_finite_differences():
    assert torch.autograd.gradcheck(lambda x, w: training_ops.rms_norm(x, w, 1e-5), norm_inputs())


def test_norm_equals_torchs():
    x, weight = norm_inputs()
    ours, theirs = training_ops.rms_norm(x, weight, 1e-5), F.rms_norm(x, (8,), weight, 1e-5)
    torch.testing.assert_close(ours, theirs)
    slope = torch.randn_like(ours)
    got = torch.autograd.grad(ours, (x, weight), slope)
    wanted = torch.autograd.grad(theirs, (x, weight), slope)
    for own, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(own, other)


def test_norm_of_zeros_and_under_autocast():
    x, weight = norm_inputs(torch.float32)
    zeros = torch.zeros_like(x).requires_grad_()
    out = training_ops.rms_norm(zeros, weight, 1e-5)
    assert not out.any()
    assert torch.isfinite(torch.autograd.grad(out.sum(), zeros)[0]).all()
    with torch.autocast("cpu", torch.bfloat16):
        half = training_ops.rms_norm(x, weight, 1e-5)
    # Rounded once.
    assert torch.equal(half, training_ops.rms_norm(x, weight, 1e-5).bfloat16())
    for grad in torch.autograd.grad(half, (x, weight), half):
        assert grad.dtype == torch.float32


def heads_by_torch(projected, rope, heads, kv_heads):
    parts = projected.unflatten(-1, (heads + 2 * kv_heads, -1))
    q, k, v = parts.split([heads, kv_heads, kv_heads], dim=2)
    return [x.transpose(1, 2) for x in (apply_rope(q, rope), apply_rope(k, rope), v)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2)])
def test_rotated_heads_match_apply_rope(dtype, heads, kv_heads):
    torch.manual_seed(0)
    rope = rope_table((3, 4), 8, 10000.0, torch.device("cpu"))[[-1, -1, *range(11)]]
    x = torch.randn(2, 13, (heads + 2 * kv_heads) * 8).to(dtype).requires_grad_()
    before = x.detach().clone()
    ours = training_ops.rotated_heads(x, rope, heads, kv_heads)
    theirs = heads_by_torch(x, rope, heads, kv_heads)
    slopes = [torch.randn_like(part) for part in ours]
    torch.testing.assert_close(list(ours), theirs)
    (got,) = torch.autograd.grad(ours, x, slopes)
    (wanted,) = torch.autograd.grad(theirs, x, slopes)
    torch.testing.assert_close(got, wanted)
    assert torch.equal(x, before)
    # No key or query has anything to do with the condition.
    assert not ours[0][:, :, :2].any()
    assert not ours[1][:, :, :2].any()


def test_rotated_heads_gradients_match_finite_differences():
    torch.manual_seed(0)
    rope = rope_table((2, 2), 4, 10000.0, torch.device("cpu"))[[-1, 0, 1, 2, 3]]
    x = torch.randn(2, 5, 4 * 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: training_ops.rotated_heads(x, rope, 2, 1), x)


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (2, 3, 17, 8)])
def test_attention_gradients_are_those_of_finite_differences(shape):
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(training_ops.causal_attention, inputs)


def assert_same_with_gradients(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs)
    slope = torch.randn_like(ours)
    got = torch.autograd.grad(ours, inputs, slope)
    wanted = torch.autograd.grad(theirs, inputs, slope)
    for own, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("longest_kept", [18, 19])
def test_attention_in_chunks_equals_fused_attention(monkeypatch, longest_kept):
    monkeypatch.setattr(training_ops, "_CHUNK_SCORES", 4 * 19 * 19)
    monkeypatch.setattr(training_ops, "_MAX_STORED_LENGTH", longest_kept)
    torch.manual_seed(0)
    inputs = [torch.randn(3, 5, 19, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    ours = training_ops.causal_attention(*inputs)
    theirs = F.scaled_dot_product_attention(*inputs, is_causal=True)
    assert_same_with_gradients(ours, theirs, inputs)


@pytest.mark.parametrize("longest_kept", [11, 12])
@pytest.mark.parametrize("shift", [0, 1])
def test_attention_leaves_padding_out(monkeypatch, longest_kept, shift):
    monkeypatch.setattr(training_ops, "_CHUNK_SCORES", 4 * 12 * 12)
    monkeypatch.setattr(training_ops, "_MAX_STORED_LENGTH", longest_kept)
    torch.manual_seed(0)
    inputs = [torch.randn(4, 3, 12, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    valid = torch.ones(4, 12, dtype=torch.bool)
    valid[1, :3], valid[2, 0:5:2], valid[3, :4] = False, False, False
    valid = valid.roll(shift, 0)
    allowed = (torch.ones(12, 12, dtype=torch.bool).tril() & valid[:, None, None]) | torch.eye(
        12
    ).bool()
    ours = training_ops.causal_attention(*inputs, valid)
    theirs = F.scaled_dot_product_attention(*inputs, attn_mask=allowed)
    assert_same_with_gradients(ours, theirs, inputs)


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
    ours, theirs = results(training_ops.causal_attention, half), results(fused, half)
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
    own = training_ops.causal_attention
    monkeypatch.setattr(training_ops, "causal_attention", lambda *a: called.append(1) or own(*a))

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return mean_loss(model(codes[:, :-1], labels), codes)

    ours = loss()
    assert len(called) == 2
    monkeypatch.setattr(training_ops, "should_use_causal_attention", lambda *_: False)
    assert ours.item() == pytest.approx(loss().item(), rel=1e-3)
    assert len(called) == 2


def mean_loss(logits, codes, weights=None):
    """Cross-entropy, with a weight for each image."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten(), reduction="none")
    weights = torch.ones(len(codes)) if weights is None else weights
    return (losses.view_as(codes).mean(1) * weights).sum() / weights.sum()


def small_model(**changes):
    torch.manual_seed(0)
    config = TransformerConfig(
        dim=64, layers=2, heads=4, codebook_size=32, num_classes=4, grid=(4, 4), text_dim=12,
        token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0, **changes,
    )  # fmt: skip
    model = Transformer(config).train()
    torch.nn.init.normal_(model.output.weight, std=0.02)
    return model


def padded_text():
    """Features (3, 6, 12) and their mask: one caption whole, one with padding, one missing."""
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, :4], mask[2] = False, False
    return torch.randn(3, 6, 12), mask


@pytest.mark.parametrize("changes", [{}, {"kv_heads": 2}, {"condition": "text"}])
def test_a_models_gradients_are_those_of_torchs_operations(monkeypatch, changes):
    model = small_model(**changes)
    codes = torch.randint(32, (3, 16))
    features, mask = padded_text()
    given = {} if "condition" not in changes else {"condition_mask": mask}
    condition = features if given else torch.tensor([0, 1, 2])

    def gradients():
        model.zero_grad()
        loss = mean_loss(model(codes[:, :-1], condition, **given), codes)
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    ours = gradients()
    monkeypatch.setattr(training_ops, "should_use", lambda _: False)
    theirs = gradients()
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-4, atol=1e-7, msg=name)


def test_a_text_model_in_bfloat16_gets_the_same_losses(monkeypatch):
    model = small_model(condition="text")
    codes = torch.randint(32, (3, 16))
    features, mask = padded_text()
    weights = torch.tensor([1.0, 1.0, 0.0])
    called = []
    own = training_ops.causal_attention
    monkeypatch.setattr(training_ops, "causal_attention", lambda *a: called.append(1) or own(*a))

    def step():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(codes[:, :-1], features, condition_mask=mask)
            loss = mean_loss(logits, codes, weights)
        loss.backward()
        return loss.item(), model.layers[0].attention.wqkv.weight.grad.clone()

    loss, grad = step()
    assert len(called) == 2
    monkeypatch.setattr(training_ops, "should_use", lambda _: False)
    other_loss, other_grad = step()
    assert len(called) == 2
    assert loss == pytest.approx(other_loss, rel=1e-3)
    assert (grad - other_grad).norm() < 0.02 * other_grad.norm()
