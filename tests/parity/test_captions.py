"""Captions are cleaned as those that the published models were trained with."""

import json

from llamagen.text.cleaning import clean_caption


def test_cleaning(fixtures):
    cases = json.loads((fixtures / "caption_cleaning.json").read_text())
    assert len(cases) > 30
    found = {case["caption"]: clean_caption(case["caption"]) for case in cases}
    assert found == {case["caption"]: case["cleaned"] for case in cases}
