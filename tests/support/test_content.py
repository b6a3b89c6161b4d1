"""Files are the same if their content is, whatever their names, places, sizes and times."""

import os
import shutil

import pytest

from llamagen.support import content
from llamagen.support.content import files_digest, identity, is_same


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Three files, whose digests are remembered at once."""
    monkeypatch.setenv("LLAMAGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "_SETTLED", -1)
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    paths = [folder / "a", folder / "sub" / "b", folder / "c"]
    for path in paths:
        path.write_bytes(path.name.encode() * 10)
    return paths


@pytest.fixture
def read(monkeypatch):
    """Names of the files that are read."""
    names, digest = [], content._digest
    monkeypatch.setattr(content, "_digest", lambda path: names.append(path.name) or digest(path))
    return names


def test_only_changed_files_are_read_again(files, read, tmp_path):
    first = files_digest(tmp_path / "data", files)
    assert sorted(read) == ["a", "b", "c"]
    assert files_digest(tmp_path / "data", files) == first
    assert len(read) == 3
    files[1].write_bytes(b"B" * 10)
    assert files_digest(tmp_path / "data", files) != first
    assert read[3:] == ["b"]
    files[1].write_bytes(b"b" * 10)
    assert files_digest(tmp_path / "data", files) == first
    # A part of the files, as of a split, is remembered with the others.
    files_digest(tmp_path / "data", files[:2])
    assert read[3:] == ["b", "b"]


def test_notices_a_change_whose_time_was_reset(files, tmp_path):
    before = files[0].stat()
    first = files_digest(tmp_path / "data", files)
    files[0].write_bytes(b"A" * 10)
    os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert files[0].stat().st_mtime_ns == before.st_mtime_ns
    assert files_digest(tmp_path / "data", files) != first


def test_files_that_have_just_changed_are_not_trusted(files, read, monkeypatch, tmp_path):
    monkeypatch.setattr(content, "_SETTLED", 10**12)
    for _ in range(2):
        files_digest(tmp_path / "data", files)
    assert len(read) == 6


def test_depends_on_content_and_order_only(files, tmp_path, monkeypatch):
    first = files_digest(tmp_path / "data", files)
    moved = shutil.copytree(tmp_path / "data", tmp_path / "moved")
    assert files_digest(moved, [moved / path.relative_to(tmp_path / "data") for path in files]) == (
        first
    )
    assert files_digest(tmp_path / "data", files[::-1]) != first
    monkeypatch.chdir(tmp_path)
    assert files_digest("data", [path.relative_to(tmp_path) for path in files]) == first


def test_works_without_a_memory(files, tmp_path):
    first = files_digest(tmp_path / "data", files)
    (memory,) = (tmp_path / "cache" / "content").iterdir()
    memory.write_text("{")
    assert files_digest(tmp_path / "data", files) == first
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").touch()
    assert files_digest(tmp_path / "data", files) == first


def test_files_that_cannot_be_read_count_as_such(files, tmp_path):
    first = files_digest(tmp_path / "data", files)
    files[0].unlink()
    assert files_digest(tmp_path / "data", files) != first


def test_identities_of_older_versions_say_nothing_of_content():
    now = identity("names", "abc")
    assert is_same(now, now)
    assert is_same("names", now)
    assert is_same(now, "names")
    assert not is_same("other", now)
    assert not is_same("name", now)
    assert not is_same(identity("names", "abd"), now)
    assert not is_same(None, now)
