"""What a name means: of a class, among the folders of a data set, in another spelling."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st

from llamagen.data.columns import sort_names
from llamagen.support.labels import Labels
from tests.properties.checking import TEXTS, answer, holds_for, new_folder

# Letters with two cases and two forms of Unicode, digits of two scripts, and what joins words.
LETTERS = [
    "a",
    "A",
    "b",
    "é",
    "e\N{COMBINING ACUTE ACCENT}",
    "É",
    "0",
    "1",
    "2",
    "٢",
    "-",
    "_",
    " ",
]
NAMES = st.lists(st.sampled_from(LETTERS), min_size=1, max_size=4).map("".join)
CLASSES = st.lists(NAMES, min_size=1, max_size=6, unique=True)
FILE_NAMES = st.text(
    st.characters(exclude_characters="/\0")
    | st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF)
)
"""Names of folders, of which bytes may be undecodable."""


def composed(text):
    return unicodedata.normalize("NFC", text).strip()


def loose(text):
    """A name without case, and with a space for whatever joins its words."""
    text = composed(composed(text).casefold())
    is_number = re.fullmatch("-?[0-9]+", text)
    return text if is_number else " ".join(re.split("[-_ ]+", text)).strip()


def oracle(names, text):
    """The class that a text means, None if it means none or more than one."""
    for spelling in (str, composed, loose):
        found = [i for i, name in enumerate(names) if spelling(name) == spelling(text)]
        if found:
            return found[0] if len(found) == 1 else None
    if re.fullmatch("[0-9]+", text.strip()) and int(text) < len(names):
        return int(text)
    return None


@holds_for(names=CLASSES, data=st.data())
def test_a_class_is_found_by_its_exact_name(names, data):
    index = data.draw(st.integers(0, len(names) - 1))
    assert Labels(tuple(names)).find(names[index]) == index


@holds_for(names=CLASSES, text=NAMES | st.sampled_from(["0", "1", "5", "-1", " 1 ", "1.0"]))
def test_exact_spelling_comes_before_any_other_and_then_the_number(names, text):
    # What only joins words, and zeros in front of a number, are spellings of nothing else.
    assume(all(any(map(str.isalnum, each)) for each in (*names, text)))
    assume(not any(re.search(r"(?<![0-9])0[0-9]", each) for each in (*names, text)))
    assert answer(lambda: Labels(tuple(names)).find(text)) == oracle(names, text)


@holds_for(name=st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), others=CLASSES)
def test_both_forms_of_unicode_are_one_name(name, others):
    forms = {unicodedata.normalize(form, name) for form in ("NFC", "NFD")}
    assume(any(map(str.isalnum, name)))
    assume(loose(name) not in map(loose, others))
    for stored in forms:
        labels = Labels((*others, stored))
        for asked in forms:
            assert labels.find(asked) == len(others)


@holds_for(
    names=CLASSES,
    number=st.integers(-3, 12) | st.integers(),
    kind=st.sampled_from([int, np.int64, np.uint8, torch.tensor]),
)
def test_a_number_is_an_index_whatever_the_names(names, number, kind):
    assume(kind is int or 0 <= number < 200)
    found = answer(lambda: Labels(tuple(names)).find(kind(number)))
    assert found == (number if 0 <= number < len(names) else None)
    assert type(found) in (int, type(None))


@holds_for(names=st.lists(TEXTS, min_size=1), text=st.text() | st.just("9" * 5000))
def test_any_other_text_is_refused_in_one_line(names, text):
    index = answer(lambda: Labels(tuple(names)).find(text))
    assert index is None or 0 <= index < len(names)


@holds_for(
    names=st.lists(FILE_NAMES, max_size=5),
    aliases=st.lists(st.lists(FILE_NAMES, max_size=2).map(tuple), min_size=5, max_size=5),
)
def test_names_come_back_from_their_file(names, aliases):
    some = tuple(aliases[: len(names)])
    labels = Labels(tuple(names), some if any(some) else ())
    with new_folder() as folder:
        labels.save(folder / "labels.json")
        assert Labels.load(folder / "labels.json") == labels


@holds_for(names=st.sets(NAMES | st.integers(0, 3000).map(str)), seed=st.randoms())
def test_the_order_of_classes_depends_on_their_names_only(names, seed):
    shuffled = sorted(names)
    seed.shuffle(shuffled)
    ordered = sort_names(dict.fromkeys(shuffled).keys())
    assert sorted(ordered) == sorted(names)
    assert ordered == sort_names(names)
    if all(re.fullmatch("[0-9]+", name) for name in names):
        assert [*map(int, ordered)] == sorted(map(int, names))
    elif not any(name.isdecimal() for name in names):
        assert ordered == sorted(names)
