"""Tables of images and of prompts: their rows, labels and captions."""

from __future__ import annotations

import csv
import io
import json
import math

from hypothesis import assume, example
from hypothesis import strategies as st

from llamagen.config import MAX_INTEGER
from llamagen.data import open_images
from llamagen.data.captions import (
    Caption,
    CaptionTable,
    captions_of,
    draw_caption,
    write_captions,
)
from llamagen.data.columns import SourceConfig, classes_of
from llamagen.data.sources import read_prompts
from tests.properties.checking import (
    JSON,
    TEXTS,
    answer,
    attempt,
    holds_for,
    new_folder,
)

BREAKS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e", "\ufeff", "\xa0", "\u200b"]
"""Not line breaks, although str.splitlines and others take some for one."""
WORDS = st.lists(
    st.sampled_from(["a", "B", "é", "犬", "🦊", '"', "'", ",", ";", "|", "\\", "0", " ", *BREAKS]),
    min_size=1,
    max_size=6,
)
PROMPTS = WORDS.map(lambda parts: "".join(["x", *parts, "y"]))
"""Texts of one line that say something; spaces at their ends are left out of prompts."""
CATEGORIES = st.lists(st.sampled_from(["a", "1", " ", "é"]), max_size=3).map("".join)


def written(kind, rows):
    """A table as common programs write it, of columns with these names."""
    columns = list(rows[0])
    if kind == "txt":
        return "".join(f"{row['prompt']}\n" for row in rows)
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if kind == "json":
        return json.dumps(rows, ensure_ascii=False, indent=1)
    if kind == "tsv":
        return "".join("\t".join(row) + "\n" for row in [columns, *(r.values() for r in rows)])
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


@holds_for(
    rows=st.lists(st.tuples(PROMPTS, CATEGORIES), min_size=1, max_size=5),
    kind=st.sampled_from(["txt", "csv", "tsv", "jsonl", "json"]),
    mark=st.booleans(),
    windows=st.booleans(),
)
def test_every_row_of_a_file_of_prompts_is_a_prompt(rows, kind, mark, windows):
    rows = [{"prompt": text, "category": category} for text, category in rows]
    text = written(kind, rows)
    if windows:
        text = text.replace("\r\n", "\n").replace("\n", "\r\n")
    with new_folder() as folder:
        path = folder / f"prompts.{kind}"
        path.write_bytes(("\ufeff" if mark else "").encode() + text.encode())
        found = read_prompts(path)
    assert [each.text for each in found] == [row["prompt"] for row in rows]
    if kind != "txt":
        assert [each.about["category"] for each in found] == [row["category"] for row in rows]


INVISIBLE = st.lists(
    st.sampled_from([" ", "\t", "\u200b", "\u2060", "\ufeff", "\xad", "\u200d", "\u2028"]),
    max_size=4,
).map("".join)


@holds_for(before=INVISIBLE, visible=st.sampled_from(["", "a", "犬", "🦊", "7"]), after=INVISIBLE)
def test_a_prompt_says_something_that_can_be_seen(before, visible, after):
    with new_folder() as folder:
        path = folder / "prompts.jsonl"
        path.write_text(json.dumps({"prompt": before + visible + after}), encoding="utf-8")
        found = answer(lambda: read_prompts(path))
    assert (found is not None) == bool(visible)


@holds_for(
    content=st.binary(max_size=60) | TEXTS.map(str.encode) | JSON.map(json.dumps).map(str.encode),
    kind=st.sampled_from([".txt", ".csv", ".tsv", ".jsonl", ".json", ".xyz", ""]),
)
@example(content=b"[" * 100_000, kind=".json")
@example(content=b'{"a": ' * 100_000, kind=".jsonl")
def test_any_content_of_a_table_is_read_or_refused_in_one_line(content, kind):
    with new_folder() as folder:
        for name, read in (("prompts", read_prompts), ("metadata", open_images)):
            path = folder / f"{name}{kind}"
            path.write_bytes(content)
            found, refusal = attempt(lambda read=read, path=path: read(path))
            assert len(found) > 0 if refusal == "" else name in refusal


LABELS = st.lists(
    st.sampled_from(["cat", "Cat", "1", "01", "2", "10", "2019", "2020", "٣", "é"]), min_size=1
)


@holds_for(values=LABELS | st.lists(st.integers(0, 30), min_size=1))
def test_the_class_of_a_row_is_named_by_its_label(values):
    labels, names = classes_of(values, "here")
    assert [names[label] for label in labels] == [str(value) for value in values]
    assert len(set(names)) == len(names)


@holds_for(years=st.sets(st.integers(1000, 3000), min_size=1, max_size=5), as_text=st.booleans())
def test_years_are_classes_without_those_between(years, as_text):
    values = [str(year) if as_text else year for year in years]
    assert classes_of(values, "here")[1] == tuple(map(str, sorted(years)))


@holds_for(
    names=st.sets(st.integers(0, 12).map(str) | st.sampled_from(["cat", "Cat", "é"]), min_size=1),
    values=LABELS | st.lists(st.integers(-1, 12).map(str), min_size=1),
)
def test_labels_for_validation_are_matched_by_name(names, values):
    names = sorted(names)
    found = answer(lambda: classes_of(values, "here", class_names=names))
    if set(values) <= set(names):
        assert found == (tuple(map(names.index, values)), tuple(names))
    elif found is not None:
        # Without such a name, in another case, or all by index where no name is a number.
        assert found[1] == tuple(names)
        pairs = [(value, names[label]) for value, label in zip(values, found[0], strict=True)]
        by_name = all(same(*pair) for pair in pairs)
        assert by_name or (
            found[0] == tuple(map(int, values)) and not any(map(str.isdecimal, names))
        )


def same(text, name):
    return text.casefold().lstrip("0") == name.casefold().lstrip("0")


@holds_for(
    values=st.lists(
        st.none() | st.integers(-2, 2) | st.integers() | TEXTS | st.booleans(), max_size=3
    )
)
@example(values=["9" * 5000])
@example(values=[MAX_INTEGER])
def test_any_labels_are_read_or_refused_in_one_line(values):
    if (found := answer(lambda: classes_of(values, "here"))) is not None:
        assert all(0 <= label < len(found[1]) for label in found[0])


@holds_for(
    cells=st.dictionaries(
        st.sampled_from("abc"),
        st.none() | st.just(math.nan) | PROMPTS | st.just(" ") | st.lists(PROMPTS, max_size=2),
    ),
    weights=st.dictionaries(st.sampled_from("abc"), st.floats(0.01, 100), min_size=1),
    separator=st.sampled_from([None, "|", ", "]),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_columns_of_captions_share_their_weights(cells, weights, separator, uniform):
    found = captions_of(cells, weights, separator)
    texts = {}
    for column in weights:
        cell = cells.get(column)
        cell = cell if isinstance(cell, list) else [cell]
        parts = [
            each.split(separator) if separator else [each] for each in cell if isinstance(each, str)
        ]
        texts[column] = [text.strip() for part in parts for text in part if text.strip()]
    whole = math.fsum(weights[column] for column in weights if texts[column])
    expected = [(text, weights[c] / len(texts[c]) / whole) for c in weights for text in texts[c]]
    assert [each.text for each in found] == [text for text, _ in expected]
    for each, (_, weight) in zip(found, expected, strict=True):
        assert math.isclose(each.weight, weight)
    chosen = draw_caption(found, uniform)
    sums = [math.fsum(weight for _, weight in expected[:n]) for n in range(len(expected) + 1)]
    assume(all(abs(each - uniform) > 1e-9 for each in sums[1:]))
    assert chosen == next(
        (t for (t, _), at in zip(expected, sums[1:], strict=True) if uniform < at), None
    )


@holds_for(
    captions=st.lists(
        st.lists(st.builds(Caption, st.text(max_size=9), st.floats(0, 1)), max_size=3).map(tuple),
        max_size=5,
    )
)
def test_captions_come_back_from_their_file(captions):
    with new_folder() as folder:
        write_captions(folder, captions)
        table = CaptionTable(folder, len(captions))
        assert [table[index] for index in range(len(captions))] == captions


@holds_for(
    rows=st.lists(
        st.tuples(st.sampled_from(["cat", "7", "007", "2019", "é"]), PROMPTS),
        min_size=1,
        max_size=5,
    ),
    kind=st.sampled_from(["csv", "jsonl"]),
)
def test_a_table_of_images_keeps_each_rows_label_and_caption(rows, kind):
    with new_folder() as folder:
        table = [
            {"file_name": f"{n}.png", "label": label, "text": text}
            for n, (label, text) in enumerate(rows)
        ]
        for row in table:
            (folder / row["file_name"]).touch()
        (folder / f"metadata.{kind}").write_text(written(kind, table), encoding="utf-8", newline="")
        images = open_images(folder, SourceConfig())
        assert [images.key(index) for index in range(len(images))] == [
            r["file_name"] for r in table
        ]
    assert [images.class_names[label] for label in images.labels] == [label for label, _ in rows]
    assert [each[0].text for each in images.captions] == [text.strip() for _, text in rows]
