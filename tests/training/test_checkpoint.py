import errno
import json
import pickle
import shutil

import pytest
import torch

from llamagen.support.errors import InputError
from llamagen.training import checkpoint
from llamagen.training.checkpoint import CheckpointWriter, latest_checkpoint, read_checkpoint


def save(folder, step, **options):
    writer = CheckpointWriter(folder, **{"keep": 2, **options})
    weights = torch.arange(1000) + step
    writer.save(
        step=step,
        tensors={"model": {"weight": weights}},
        state={"seconds": 1.5, "seen": torch.tensor([step])},
        about={"data": {}},
    )
    # What is saved is a copy.
    weights.zero_()
    writer.wait()
    return folder / f"step-{step:07d}"


def weights_of(found):
    tensors = {"model": {"weight": torch.zeros(1000, dtype=torch.int64)}}
    found.read_tensors(tensors)
    return tensors["model"]["weight"]


def steps(folder):
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*[0-9]"))


def test_round_trip(tmp_path):
    save(tmp_path, 7)
    found = latest_checkpoint(tmp_path)
    assert found.step == 7
    assert torch.equal(weights_of(found), torch.arange(1000) + 7)
    assert found.read_state() == {"seconds": 1.5, "seen": torch.tensor([7])}
    assert {"llamagen", "torch", "step", "data"} <= set(found.about)


def test_none(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "missing") is None


def test_the_latest_are_kept(tmp_path):
    for step in (5, 10, 15, 100):
        save(tmp_path, step, keep=3)
    assert steps(tmp_path) == [10, 15, 100]
    assert latest_checkpoint(tmp_path).step == 100


def test_some_are_kept_for_good(tmp_path):
    for step in (5, 10, 15, 20, 25):
        save(tmp_path, step, keep=1, keep_every=10)
    assert steps(tmp_path) == [10, 20, 25]


def test_any_step_can_be_read(tmp_path):
    for step in (5, 10):
        save(tmp_path, step)
    assert torch.equal(weights_of(read_checkpoint(tmp_path, 5)), torch.arange(1000) + 5)
    assert read_checkpoint(tmp_path).step == 10
    with pytest.raises(InputError, match=r"no checkpoint of step 7 in .*; there is 5, 10"):
        read_checkpoint(tmp_path, 7)
    with pytest.raises(InputError, match="there are no checkpoints"):
        read_checkpoint(tmp_path / "missing")


def test_another_shape(tmp_path):
    save(tmp_path, 5)
    with pytest.raises(InputError, match="does not fit this run"):
        latest_checkpoint(tmp_path).read_tensors({"model": {"weight": torch.zeros(7)}})
    with pytest.raises(InputError, match="does not fit this run"):
        latest_checkpoint(tmp_path).read_tensors({"model": {"bias": torch.zeros(1000)}})


def truncate(path):
    file = path / "tensors" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(path):
    file = path / "tensors" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[content.index(torch.arange(50, 60).numpy().tobytes())] ^= 1
    file.write_bytes(content)


def lose_tensors(path):
    (path / "tensors" / "__0_0.distcp").unlink()


def lose_index(path):
    (path / "tensors" / ".metadata").unlink()


def lose_state(path):
    (path / "state.pt").unlink()


def lose_about(path):
    (path / "about.json").unlink()


def garble_about(path):
    (path / "about.json").write_text('{"step": ')


def empty_about(path):
    (path / "about.json").write_text(json.dumps({}))


@pytest.mark.parametrize(
    "damage",
    [
        *(truncate, flip_a_bit, lose_tensors, lose_index, lose_state),
        *(lose_about, garble_about, empty_about),
    ],
)
def test_damaged_checkpoints_are_passed_over(tmp_path, caplog, damage):
    save(tmp_path, 5)
    damage(save(tmp_path, 10))
    assert latest_checkpoint(tmp_path).step == 5
    assert "step-0000010 is damaged and passed over" in caplog.text
    # It no longer counts among the latest, which would crowd out the whole ones.
    save(tmp_path, 6)
    assert steps(tmp_path) == [5, 6]


def test_leftovers_of_interrupted_saves_are_removed(tmp_path):
    save(tmp_path, 5)
    shutil.copytree(tmp_path / "step-0000005", tmp_path / ".step-0000010.abc.tmp")
    assert latest_checkpoint(tmp_path).step == 5
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000005"]


@pytest.mark.parametrize("moment", ["at once", "in the background"])
def test_full_disk(tmp_path, monkeypatch, moment):
    save(tmp_path, 5)

    def half_written(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if moment == "at once":
        monkeypatch.setattr(checkpoint.torch, "save", half_written)
    else:
        monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", half_written)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000005"]
    assert latest_checkpoint(tmp_path).step == 5


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", ["state.pt", "tensors/.metadata"])
def test_pickles_with_code_are_refused(tmp_path, caplog, name):
    path = save(tmp_path, 5)
    harm = Malicious(str(tmp_path / "harm"))
    if name == "state.pt":
        torch.save({"weights": harm}, path / name)
    else:
        (path / name).write_bytes(pickle.dumps(harm))
    about = json.loads((path / "about.json").read_text())
    about["files"][name] = checkpoint._checksum(path / name)
    (path / "about.json").write_text(json.dumps(about))
    assert latest_checkpoint(tmp_path) is None
    assert not (tmp_path / "harm").exists()
    assert "is damaged and passed over" in caplog.text
