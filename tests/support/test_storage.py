"""Atomic files and folders."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from llamagen.support import storage
from llamagen.support.errors import InputError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def write_and_fail(writing, name: str | None = None) -> None:
    """Writes half of what is to be written, then fails."""
    with writing as temporary:
        (temporary if name is None else temporary / name).write_text("half")
        raise RuntimeError


@pytest.fixture
def umask():
    old = os.umask(0o027)
    yield
    os.umask(old)


def test_writes_file(tmp_path, umask):
    path = tmp_path / "new" / "a.txt"
    with storage.atomic_file(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
        # As writers do that have a temporary file of their own.
        replacement = temporary.with_suffix(".theirs")
        replacement.write_text("two")
        replacement.chmod(0o600)
        replacement.replace(temporary)
    assert path.read_text() == "two"
    assert mode(path) == 0o640
    assert names(path.parent) == ["a.txt"]


def test_failed_file_keeps_old_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        write_and_fail(storage.atomic_file(path))
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_json_round_trip(tmp_path):
    storage.write_json(tmp_path / "a.json", {"name": "é", "values": [1, 2]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text == '{\n  "name": "é",\n  "values": [\n    1,\n    2\n  ]\n}\n'


def test_writes_folder(tmp_path, umask):
    path = tmp_path / "new" / "model"
    with storage.atomic_folder(path) as temporary:
        (temporary / "part").mkdir()
        (temporary / "part" / "a.txt").write_text("one")
        assert not path.exists()
    assert (path / "part" / "a.txt").read_text() == "one"
    assert mode(path) == 0o750
    assert mode(path / "part" / "a.txt") == 0o640
    assert names(path.parent) == ["model"]


def test_replaces_folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "old.txt").write_text("old")
    with storage.atomic_folder(path) as temporary:
        (temporary / "new.txt").write_text("new")
        assert names(path) == ["old.txt"]
    assert names(path) == ["new.txt"]
    assert names(tmp_path) == ["model"]


def test_failed_folder_keeps_old_one(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "old.txt").write_text("old")
    with pytest.raises(RuntimeError):
        write_and_fail(storage.atomic_folder(path), "new.txt")
    assert (path / "old.txt").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_failed_rename_keeps_old_folder(tmp_path, monkeypatch):
    """The old folder comes back if the new one cannot take its place."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "old.txt").write_text("old")
    real = Path.replace

    def failing(self, target):
        if Path(target) == path and self.suffix == ".tmp":
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="Input/output"), storage.atomic_folder(path):
        pass
    assert (path / "old.txt").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_replaces_current_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with storage.atomic_folder(".") as temporary:
        (temporary / "a.txt").write_text("one")
    assert (tmp_path / "here" / "a.txt").read_text() == "one"
    assert names(tmp_path) == ["here"]


def test_keeps_links_in_folder(tmp_path):
    target = tmp_path / "elsewhere.txt"
    target.write_text("mine")
    target.chmod(0o600)
    with storage.atomic_folder(tmp_path / "model") as temporary:
        (temporary / "link").symlink_to(target)
    assert mode(target) == 0o600


def test_moves_staged_files(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    order = []
    real = Path.replace

    def recorded(self, target):
        order.append(self.name)
        return real(self, target)

    with storage.staged_files(folder, last="config.json") as staging:
        for name in ("config.json", "a.bin", "z.bin"):
            (staging / name).write_text("first")
    (folder / "mine.txt").write_text("stays")
    monkeypatch.setattr(Path, "replace", recorded)
    with storage.staged_files(folder, last="config.json") as staging:
        for name in ("config.json", "a.bin", "z.bin"):
            (staging / name).write_text("second")
            assert (folder / name).read_text() == "first"
    assert order[-1] == "config.json"
    assert names(folder) == ["a.bin", "config.json", "mine.txt", "z.bin"]
    assert (folder / "a.bin").read_text() == "second"


@pytest.mark.parametrize("existing", [False, True])
def test_failed_staging_changes_nothing(tmp_path, existing):
    folder = tmp_path / "deep" / "model"
    if existing:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("old")
    with pytest.raises(RuntimeError):
        write_and_fail(storage.staged_files(folder, last="config.json"), "config.json")
    if existing:
        assert names(folder) == ["config.json"]
        assert (folder / "config.json").read_text() == "old"
    else:
        assert not folder.exists()


def test_requires_writable_folder(tmp_path):
    assert storage.require_writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert names(tmp_path / "a" / "b") == []
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "in"):
        with pytest.raises(InputError, match=r"cannot write to .*file.*; choose another folder"):
            storage.require_writable(folder)
