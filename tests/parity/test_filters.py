"""Top-k and top-p keep exactly the codes that the published sampler keeps."""

from __future__ import annotations

import torch

from llamagen.config import SamplingConfig
from llamagen.generation.sampling import Filters


def test_kept_codes(read_case):
    case = read_case("sampling_filters")
    logits = case.tensor("logits")
    before = logits.clone()
    for settings in case.info["cases"]:
        sampling = SamplingConfig(top_k=settings["top_k"], top_p=settings["top_p"])
        kept = Filters.of([sampling])(logits).isfinite()
        assert torch.equal(kept, case.tensor(settings["array"])), settings
    assert torch.equal(logits, before), "a filter edited its input"
