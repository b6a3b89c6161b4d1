"""Folders of images: which files are images, what their classes are, what has changed."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from unittest import mock

from hypothesis import strategies as st

from llamagen.data.images import ImageFolder, find_images, split_keys, spread
from llamagen.evaluation.image_sets import CollectedImages
from tests.properties.checking import answer, attempt, holds_for, messages, new_folder

NAMES = st.sampled_from(["ant", "Bee", "été", "907", "1000", ".hidden", "Bee fly"])
FILES = st.builds("".join, st.tuples(NAMES, st.sampled_from([".png", ".JPG", ".heic", ".txt", ""])))
TREES = st.recursive(
    st.dictionaries(FILES, st.none(), max_size=3),
    lambda inner: st.dictionaries(FILES, st.none(), max_size=3).flatmap(
        lambda files: st.dictionaries(NAMES, inner, max_size=3).map(lambda folders: folders | files)
    ),
    max_leaves=8,
)
"""Folders as dictionaries, with None for a file."""


def write(tree, folder, order=sorted):
    """Create a tree; links are the paths of what they lead to."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in order(tree):
        content, path = tree[name], folder / name
        if isinstance(content, dict):
            write(content, path, order)
        elif isinstance(content, Path):
            path.symlink_to(content)
        else:
            path.write_bytes(content or b"")


def images_of(tree, path=()):
    """The paths, as tuples of names, of the images in a tree."""
    for name, content in tree.items():
        if name.startswith("."):
            continue
        if isinstance(content, dict):
            yield from images_of(content, (*path, name))
        elif name.lower().endswith((".png", ".jpg")):
            yield (*path, name)


def keys(collection):
    return [collection.key(index) for index in range(len(collection))]


def classes(collection):
    """The name of each image's class, by the image's key."""
    names = map(collection.class_names.__getitem__, collection.labels)
    return dict(zip(keys(collection), names, strict=True))


@holds_for(tree=TREES)
def test_all_images_are_found_in_the_order_of_their_paths(tree):
    expected = set(images_of(tree))
    with new_folder() as folder:
        write(tree, folder)
        found = answer(lambda: find_images(folder))
        assert (found is None) == (not expected)
        assert sorted(found or []) == (found or [])
        assert Counter(path.relative_to(folder).parts for path in found or []) == Counter(expected)


@holds_for(tree=TREES)
def test_the_class_of_an_image_is_its_folder_and_no_class_vanishes(tree):
    images = sorted(images_of(tree))
    folders = {name for name, each in tree.items() if isinstance(each, dict) and name[0] != "."}
    without = folders - {path[0] for path in images}
    with new_folder() as folder, messages() as said:
        write(tree, folder / "set")
        found, refusal = attempt(lambda: ImageFolder.scan(folder / "set"))
    if found is None:
        mixed = len({len(path) == 1 for path in images}) == 2
        assert not images or mixed or any(name in refusal for name in without)
        return
    assert set(keys(found)) == {"/".join(path) for path in images}
    if all(len(path) == 1 for path in images):
        assert found.labels is None
        return
    assert classes(found) == {"/".join(path): path[0] for path in images}
    assert set(found.class_names) == {path[0] for path in images}
    for name in without:
        if any(each.endswith(".heic") for each in names_in(tree[name])):
            assert name in "\n".join(said)


def names_in(tree):
    """The names of all files of a tree that are not hidden."""
    for name, content in tree.items():
        if not name.startswith("."):
            yield from names_in(content) if isinstance(content, dict) else [name]


@holds_for(
    links=st.dictionaries(
        st.sampled_from(["ant", "bee", "cow", "zebra"]),
        st.sampled_from(["one", "two", "ant", "bee", "."]),
        min_size=1,
        max_size=3,
    ),
    seed=st.randoms(),
)
def test_links_are_classes_whatever_the_order_on_the_disk(links, seed):
    found, told = [], []
    for order in (sorted, lambda names: sorted(names, key=lambda _: seed.random())):
        with new_folder() as folder, messages() as said:
            for number, name in enumerate(("one", "two")):
                write({f"{number}.png": None}, folder / name)
            tree = {"m": {"0.png": None}} | {
                name: (folder if to in ("one", "two") else folder / "set") / to
                for name, to in links.items()
            }
            write(tree, folder / "set", order)
            images, refusal = attempt(lambda folder=folder: ImageFolder.scan(folder / "set"))
            told.append([line.replace(str(folder), "") for line in (refusal, *said)])
        found.append(images and classes(images))
        outside = {name for name, to in links.items() if to in ("one", "two")}
        for name in outside - set(images.class_names if images else outside):
            assert any(name in line for line in told[-1])
    assert found[0] == found[1]
    assert told[0] == told[1]


@holds_for(
    whole=st.sets(st.sampled_from("abc"), min_size=1),
    dangling=st.sets(st.sampled_from(["lost", "gone", "away"]), min_size=1),
    labelled=st.booleans(),
)
def test_a_link_to_nothing_is_no_image(whole, dangling, labelled):
    tree = dict.fromkeys(f"{name}.png" for name in whole)
    with new_folder() as folder, messages() as said:
        tree |= {f"{name}.png": folder / "nothing" for name in dangling}
        write({"class": tree} if labelled else tree, folder / "set")
        found, refusal = attempt(lambda: ImageFolder.scan(folder / "set"))
    assert any(f"{name}.png" in line for line in (refusal, *said) for name in dangling)
    assert found is None or {path.stem for path in found.paths} == whole


@holds_for(
    names=st.sets(st.text(min_size=1, max_size=5), min_size=1, max_size=30),
    fraction=st.floats(0, 1, exclude_max=True),
    seed=st.randoms(),
)
def test_what_is_held_out_depends_on_the_names_only(names, fraction, seed):
    names = sorted(names)
    rest, part = split_keys(names, fraction)
    assert sorted(rest + part) == list(range(len(names)))
    assert len(part) <= max(1, fraction * len(names) + 0.5)
    assert len(rest) >= 1
    if fraction > 0 and len(names) > 1:
        assert len(part) >= max(1, fraction * len(names) - 0.5) - (len(rest) == 1)
    shuffled = sorted(names, key=lambda _: seed.random())
    again = split_keys(shuffled, fraction)[1]
    assert {names[index] for index in part} == {shuffled[index] for index in again}


@holds_for(count=st.integers(1, 400), limit=st.integers(1, 400))
def test_a_few_are_spread_evenly_over_all(count, limit):
    found = spread(count, limit)
    assert len(found) == min(count, limit)
    gaps = {after - before for before, after in zip(found, [*found[1:], count], strict=True)}
    assert found[0] == 0
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1


PIXELS = st.sampled_from([b"\0\0\0", b"\0\0\1", b"abc"])
CONTENTS = st.dictionaries(st.sampled_from(["1", "2", "3"]), PIXELS, min_size=1, max_size=3)


@holds_for(before=CONTENTS, after=CONTENTS)
def test_images_are_identified_by_their_names_and_content(before, after):
    with new_folder() as folder, mock.patch.dict(os.environ, LLAMAGEN_CACHE=str(folder / "cache")):
        found = []
        for content in (before, after, before):
            # In one place, and all of one size.
            shutil.rmtree(folder / "set", ignore_errors=True)
            files = {f"{name}.ppm": b"P6 1 1 255\n" + pixel for name, pixel in content.items()}
            write({"class": files}, folder / "set")
            found.append(CollectedImages(folder / "set").identity)
    assert (found[0] == found[1]) == (before == after)
    assert found[0] == found[2]
