import pytest

from llamagen.data.captions import (
    Caption,
    CaptionTable,
    captions_of,
    draw_caption,
    write_captions,
)
from llamagen.data.columns import SourceConfig, caption_columns
from llamagen.support.errors import InputError


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "red heart", "aliases": ""}, (("red heart", 1.0),)),
        ({"text": "red heart", "aliases": "love"}, (("red heart", 0.75), ("love", 0.25))),
        (
            {"text": "red heart", "aliases": "love| <3 |"},
            (("red heart", 0.75), ("love", 0.125), ("<3", 0.125)),
        ),
        ({"text": ["one", "two"], "aliases": None}, (("one", 0.5), ("two", 0.5))),
        ({"text": " ", "aliases": float("nan")}, ()),
        ({"text": "\u200b\u3164", "aliases": "love"}, (("love", 1.0),)),
        ({}, ()),
    ],
)
def test_captions_of_a_row(row, expected):
    assert captions_of(row, {"text": 3.0, "aliases": 1.0}, "|") == expected


def test_splits_only_at_a_separator():
    assert captions_of({"text": "a|b"}, {"text": 1.0}, None) == (("a|b", 1.0),)


def test_samples_by_weight():
    captions = (Caption("long", 0.7), Caption("short", 0.3))
    drawn = [draw_caption(captions, number / 1000) for number in range(1000)]
    assert drawn.count("short") == pytest.approx(300, abs=1)
    assert draw_caption((), 0.5) is None
    # Weights need not add up to 1 exactly.
    assert draw_caption((Caption("a", 0.333),), 0.9999) == "a"


def test_finds_caption_columns():
    columns = ["file_name", "text", "long", "short"]
    assert caption_columns(SourceConfig(), columns, "t") == {"text": 1.0}
    assert caption_columns(SourceConfig(), ["file_name"], "t") == {}
    chosen = SourceConfig(caption_columns=("long", "short"), caption_weights=(7, 3))
    assert caption_columns(chosen, columns, "t") == {"long": 7, "short": 3}
    with pytest.raises(InputError, match="no column 'none' for the caption"):
        caption_columns(SourceConfig(caption_columns=("none",)), columns, "t")
    for bad in ({"caption_weights": (1.0,)}, {"caption_separator": ""}):
        with pytest.raises(InputError, match="caption_"):
            SourceConfig(**bad)


class TestTable:
    CAPTIONS = (
        (Caption("röd", 0.7), Caption('a "quoted"\nline', 0.3)),
        (),
        (Caption("", 1.0),),
    )

    def test_round_trip(self, tmp_path):
        write_captions(tmp_path, self.CAPTIONS)
        table = CaptionTable(tmp_path, 3)
        assert [table[index] for index in (2, 0, 1)] == [self.CAPTIONS[i] for i in (2, 0, 1)]
        write_captions(tmp_path, [])
        CaptionTable(tmp_path, 0)

    def test_rejects_damaged_files(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"captions\.bin is missing"):
            CaptionTable(tmp_path, 3)
        write_captions(tmp_path, self.CAPTIONS)
        with pytest.raises(InputError, match="3 of 4 images"):
            CaptionTable(tmp_path, 4)
        content = (tmp_path / "captions.bin").read_bytes()
        (tmp_path / "captions.bin").write_bytes(content[:-1])
        with pytest.raises(InputError, match="run llamagen extract-codes again"):
            CaptionTable(tmp_path, 3)
        (tmp_path / "captions.npy").write_bytes(b"nothing")
        with pytest.raises(InputError, match=r"captions\.npy is damaged"):
            CaptionTable(tmp_path, 3)
