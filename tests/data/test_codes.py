import torch

from llamagen.data.codes import tokenizer_fingerprint
from tests.models import tiny_tokenizer


def test_fingerprint():
    assert tokenizer_fingerprint(tiny_tokenizer(0)) == tokenizer_fingerprint(tiny_tokenizer(0))
    others = [tiny_tokenizer(1), tiny_tokenizer(0, codebook_l2_norm=False)]
    changed = tiny_tokenizer(0)
    with torch.no_grad():
        changed.decoder.conv_out.bias[0] += 1e-6
    fingerprints = {tokenizer_fingerprint(t) for t in [tiny_tokenizer(0), changed, *others]}
    assert len(fingerprints) == 4
