import errno
import json
import shutil

import pytest
import torch

from llamagen.training import checkpoint
from llamagen.training.checkpoint import latest_checkpoint, save_checkpoint


def save(folder, step, *, keep=2):
    state = {"weights": torch.arange(1000) + step}
    return save_checkpoint(folder, step=step, state=state, about={"data": {}}, keep=keep)


def steps(folder):
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*[0-9]"))


def test_round_trip(tmp_path):
    save(tmp_path, 7)
    found = latest_checkpoint(tmp_path)
    assert found.step == 7
    assert torch.equal(found.state["weights"], torch.arange(1000) + 7)
    assert {"llamagen", "torch", "step", "data"} <= set(found.about)


def test_none(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "missing") is None


def test_the_latest_are_kept(tmp_path):
    for step in (5, 10, 15, 100):
        save(tmp_path, step, keep=3)
    assert steps(tmp_path) == [10, 15, 100]
    assert latest_checkpoint(tmp_path).step == 100


def truncate(path):
    state = path / "state.pt"
    state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])


def flip_a_bit(path):
    state = path / "state.pt"
    content = bytearray(state.read_bytes())
    content[content.index(torch.arange(50, 60).numpy().tobytes())] ^= 1
    state.write_bytes(content)


def lose_state(path):
    (path / "state.pt").unlink()


def lose_about(path):
    (path / "about.json").unlink()


def garble_about(path):
    (path / "about.json").write_text('{"step": ')


def empty_about(path):
    (path / "about.json").write_text(json.dumps({}))


@pytest.mark.parametrize(
    "damage", [truncate, flip_a_bit, lose_state, lose_about, garble_about, empty_about]
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


def test_full_disk(tmp_path, monkeypatch):
    save(tmp_path, 5)

    def half_written(_state, file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", half_written)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000005"]
    assert latest_checkpoint(tmp_path).step == 5


def test_pickles_with_code_are_refused(tmp_path, caplog):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    path = save(tmp_path, 5)
    torch.save({"weights": Malicious()}, path / "state.pt")
    assert latest_checkpoint(tmp_path) is None
    assert not (tmp_path / "harm").exists()
    assert "holds more than tensors and plain values" in caplog.text
