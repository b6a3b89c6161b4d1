"""Artifacts: resumed after a kill, a full disk or damage; the same with several processes."""

import dataclasses
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import llamagen.support.storage as storage
from llamagen.support.artifact import Artifact, Format, read_manifest, write_npy
from llamagen.support.errors import InputError

ROOT = Path(__file__).parents[2]


def check(artifact, piece):
    values = artifact.read_json(piece)
    artifact.check_npy(piece, (len(values["squares"]), 2), "int32")


FORM = Format(
    name="squares",
    version=3,
    noun="table of squares",
    command="make squares",
    other_files=("notes.txt",),
    free=("speed",),
    words={"power": "another power", "source": "other numbers"},
    check=check,
)
SETTINGS = {"power": 2, "source": {"start": 0, "names": ("a", "b")}, "speed": 1}
ARRAYS = dataclasses.replace(FORM, suffixes=(".npz",), check=None)


def squares(items, advance):
    rows = np.array([[i, i * i] for i in items], dtype=np.int32)
    advance(len(items) // 2)
    return {
        ".npy": rows,
        ".json": {"squares": rows[:, 1].tolist()},
        ".npz": {"rows": rows, "count": np.array(len(items))},
    }


def made(
    folder,
    form=FORM,
    *,
    settings=SETTINGS,
    items=11,
    advance=int,
    make=squares,
    rank=0,
    world_size=1,
    **options,
):
    artifact = Artifact(folder, form, settings, items=items, piece_size=3)
    artifact.rank, artifact.world_size = rank, world_size
    with artifact.begin(**options):
        count = artifact.make(make, advance)
        if artifact.is_done():
            artifact.finish({"count": count})
    return artifact, count


def contents(folder):
    """Content of every file, but the manifest's count, which differs from run to run."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    if "manifest.json" in found:
        found["manifest.json"] = found["manifest.json"].split(b'"count"')[0]
    return found


def test_layout(tmp_path):
    artifact, count = made(tmp_path / "a")
    assert (count, len(artifact), list(artifact.items_of(3))) == (11, 4, [9, 10])
    names = {f"shard-0000{i}.{suffix}" for i in range(4) for suffix in ("npy", "json")}
    assert {p.name for p in artifact.folder.iterdir()} == names | {"plan.json", "manifest.json"}
    settings, results = read_manifest(artifact.folder, FORM)
    assert settings == json.loads(json.dumps(SETTINGS))
    assert results == {"count": 11}
    values = artifact.read_json(1)
    assert values == {"plan": artifact.identity, "squares": [9, 16, 25]}
    np.testing.assert_array_equal(np.load(artifact.path(1, ".npy"))[:, 1], [9, 16, 25])


def test_resumes_with_progress_of_finished_pieces(tmp_path):
    counts = []
    made(tmp_path, advance=counts.append)
    assert sum(counts) == 11
    assert len(counts) > 4
    artifact, count = made(tmp_path, make=None)
    assert count == 0
    with artifact.progress_bar("making", "square") as bar:
        assert (bar.n, bar.total) == (11, 11)


@pytest.mark.parametrize("ranks", [(0, 1, 2), (2, 0, 1)])
def test_processes_share_pieces(tmp_path, ranks):
    made(tmp_path / "one")
    counts = [made(tmp_path / "three", rank=rank, world_size=3)[1] for rank in ranks]
    assert sum(counts) == 11
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


@pytest.mark.parametrize(
    ("form", "name", "damage"),
    [
        (FORM, "shard-00001.npy", None),
        (FORM, "shard-00001.npy", lambda content: content[:-1]),
        (FORM, "shard-00001.npy", lambda content: content[:20]),
        (FORM, "shard-00001.npy", lambda _: b""),
        (FORM, "shard-00001.json", None),
        (FORM, "shard-00001.json", lambda _: b"{"),
        (FORM, "shard-00001.json", lambda content: content.replace(b'"plan": "', b'"plan": "x')),
        (ARRAYS, "shard-00001.npz", None),
        (ARRAYS, "shard-00001.npz", lambda content: content[:-1]),
        (ARRAYS, "shard-00001.npz", lambda _: b""),
    ],
)
def test_remakes_damaged_pieces_only(tmp_path, form, name, damage):
    artifact, _ = made(tmp_path, form)
    before = contents(tmp_path)
    path = tmp_path / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises((InputError, FileNotFoundError), match=name + ".* make squares again"):
        artifact.check(1)
    assert not artifact.is_done()
    assert made(tmp_path, form)[1] == 3
    assert contents(tmp_path).keys() == before.keys()
    assert artifact.is_done()


def test_reads_rows_across_pieces(tmp_path):
    artifact, _ = made(tmp_path, ARRAYS)
    np.testing.assert_array_equal(artifact.rows("rows")[:, 0], range(11))
    for start, stop in ((0, 3), (2, 7), (5, 6), (9, 11)):
        np.testing.assert_array_equal(artifact.rows("rows", start, stop)[:, 0], range(start, stop))
    path = artifact.path(2, ".npz")
    content = bytearray(path.read_bytes())
    content[content.index(np.int32([8, 64]).tobytes())] ^= 255
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"shard-00002\.npz is damaged .* make squares again"):
        artifact.rows("rows")
    assert made(tmp_path, ARRAYS)[1] == 3, "a damaged file is removed, to be made again"
    np.testing.assert_array_equal(artifact.rows("rows")[:, 0], range(11))


_CHILD = """
import sys, time
from tests.support.test_artifact import made, squares
def slowly(items, advance):
    time.sleep(0.005)
    return squares(items, advance)
print("started", flush=True)
made(sys.argv[1], items=120, make=slowly)
"""


def test_resumes_after_sigkill(tmp_path):
    made(tmp_path / "whole", items=120)
    chance = random.Random(time.time_ns())
    out = tmp_path / "killed"
    for _ in range(3):
        command = [sys.executable, "-c", _CHILD, str(out)]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(chance.uniform(0.02, 0.12))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        finished = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.json")}
    made(out, items=120)
    for name, moment in finished.items():
        assert (out / name).stat().st_mtime_ns == moment
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "full_at", ["plan.json", "shard-00002.npy", "shard-00002.json", "manifest"]
)
def test_resumes_after_full_disk(tmp_path, monkeypatch, full_at):
    made(tmp_path / "whole")

    def finish(path):
        if full_at in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_finish", finish)
        with pytest.raises(OSError, match="No space left"):
            made(out)
    assert not list(out.glob(".*")), "temporary files would keep the disk full"
    whole, left = contents(tmp_path / "whole"), contents(out)
    assert "manifest.json" not in left
    assert {name: whole[name] for name in left} == left
    made(out)
    assert contents(out) == whole


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_device_error_has_cause():
    with pytest.raises(OSError, match="No space left") as raised:
        write_npy(Path("/dev/full"), np.zeros((300, 300), np.uint16))
    assert raised.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"power": 3}, r"another power \(power 2, now 3\)"),
        ({"source": {"start": 5, "names": ["a"]}}, r"other numbers \(source.start 0, now 5; sour"),
        ({"new": True}, r"other settings \(new None, now True\)"),
        ({"power": 3, "new": True}, r"another power \(power 2, now 3\)"),
    ],
)
def test_refuses_or_replaces_other_settings(tmp_path, change, words):
    made(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "notes.txt").write_text("the artifact's")
    before = contents(tmp_path)
    changed = {**SETTINGS, **change}
    with pytest.raises(InputError, match=f"table of squares in .* begun with {words}") as raised:
        made(tmp_path, settings=changed)
    assert "overwrite" not in str(raised.value)
    with pytest.raises(InputError, match=r"or `overwrite` it"):
        made(tmp_path, settings=changed, overwrite=False)
    with pytest.raises(InputError, match="several processes cannot overwrite"):
        made(tmp_path, settings=changed, overwrite=True, world_size=2)
    assert contents(tmp_path) == before
    assert made(tmp_path, overwrite=True)[1] == 0, "the same settings: nothing is deleted"
    made(tmp_path, settings=changed, items=4, overwrite=True)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert not (tmp_path / "notes.txt").exists()
    assert len(list(tmp_path.glob("shard-*.npy"))) == 2


def test_keeps_free_settings_of_first_run(tmp_path):
    artifact, _ = made(tmp_path)
    again, _ = made(tmp_path, settings={**SETTINGS, "speed": 9})
    assert again.settings["speed"] == 1
    assert again.identity == artifact.identity


def test_fills_settings_missing_in_older_folder(tmp_path):
    artifact, _ = made(tmp_path)
    wanted = {**SETTINGS, "source": {**SETTINGS["source"], "step": 1}, "sign": "+"}
    with pytest.raises(InputError, match=r"source\.step None, now 1"):
        made(tmp_path, settings=wanted)
    missing = {"source": {"step": 1}, "sign": "+"}
    again, count = made(tmp_path, settings=wanted, missing=missing)
    assert (count, again.identity) == (0, artifact.identity)
    wanted["source"]["step"] = 2
    with pytest.raises(InputError, match=r"source\.step 1, now 2"):
        made(tmp_path, settings=wanted, missing=missing)


def test_refuses_folder_of_other_files(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"not empty and holds no table of squares \(but file\)"):
        made(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        made(tmp_path / "file")
    with pytest.raises(
        FileNotFoundError, match=r"no table of squares .*make one with make squares"
    ):
        read_manifest(tmp_path, FORM)
    # What a process left behind that was killed before it had written anything.
    out = tmp_path / "out"
    out.mkdir()
    (out / ".plan.json.123.tmp").write_text("{")
    (out / ".shard-00000.npy.abc.tmp").write_text("half")
    made(out)
    assert not (out / ".shard-00000.npy.abc.tmp").exists()
    (out / "manifest.json").unlink()
    with pytest.raises(InputError, match="is not complete; run make squares again"):
        read_manifest(out, FORM)


def test_refuses_other_formats_and_versions(tmp_path):
    made(tmp_path)
    for form, words in (
        (dataclasses.replace(FORM, name="cubes"), "has format 'squares', expected 'cubes'"),
        (dataclasses.replace(FORM, version=4), "has version 3, this program reads 4"),
    ):
        with pytest.raises(InputError, match=r"plan\.json " + words):
            made(tmp_path, form)
        with pytest.raises(InputError, match=r"manifest\.json " + words):
            read_manifest(tmp_path, form)


def test_reads_folder_without_header(tmp_path):
    storage.write_json(tmp_path / "plan.json", SETTINGS)
    with pytest.raises(InputError, match="format None"):
        made(tmp_path)
    assert made(tmp_path, dataclasses.replace(FORM, has_header=False))[1] == 11


def test_refuses_other_text(tmp_path):
    artifact = Artifact(tmp_path, FORM, SETTINGS)
    with artifact.begin():
        artifact.same_text("index.txt", "a\nb\n", "other names")
        artifact.same_text("index.txt", "a\nb\n", "other names")
        with pytest.raises(InputError, match=r"begun with other names \(index.txt\)"):
            artifact.same_text("index.txt", "a\nc\n", "other names")


def test_two_runs_exclude_each_other(tmp_path):
    artifact = Artifact(tmp_path, FORM, SETTINGS, items=11, piece_size=3)
    with artifact.begin(), pytest.raises(InputError, match="another run is working"):
        made(tmp_path)
    assert made(tmp_path)[1] == 11
