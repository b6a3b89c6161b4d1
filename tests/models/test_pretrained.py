"""Models go into plain folders and come back the same, or not at all."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import llamagen.models.pretrained as pretrained
from llamagen.config import config_from_dict
from llamagen.models.pretrained import eval_mode
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.models.transformer import Transformer
from llamagen.support.errors import InputError
from tests.tiny_models import tiny_tokenizer, tiny_transformer

MODELS = {"tokenizer": tiny_tokenizer, "transformer": tiny_transformer}


def state(model) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def same(a, b) -> bool:
    first, second = state(a), state(b)
    return list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, make, stored, wanted):
    model = make().to(stored)
    assert model.save_pretrained(tmp_path / "m") is None
    before = torch.get_rng_state()
    loaded = type(model).from_pretrained(tmp_path / "m", dtype=wanted, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.dtype == (wanted or stored)
    assert loaded.config == model.config
    assert same(loaded, make().to(stored).to(wanted or stored))
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    assert all(p.is_contiguous() for p in loaded.parameters())


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_folder_contents(tmp_path, make):
    model = make()
    model.save_pretrained(tmp_path / "m")
    names = sorted(path.name for path in (tmp_path / "m").iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]
    values = json.loads((tmp_path / "m" / "config.json").read_text())
    assert values.pop("kind") == model.kind
    assert config_from_dict(type(model.config), values, "test") == model.config
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert set(stored) == set(state(model))
    umask = os.umask(0)
    os.umask(umask)
    for path in (tmp_path / "m").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path


def test_channels_last_weights(tmp_path):
    model = tiny_tokenizer().to(memory_format=torch.channels_last)
    model.save_pretrained(tmp_path / "m")
    assert same(ImageTokenizer.from_pretrained(tmp_path / "m"), tiny_tokenizer())


def test_a_loaded_model_is_saved_where_it_came_from(tmp_path):
    tiny_transformer().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("written by hand")
    (tmp_path / "m" / "notes.txt").write_text("mine")
    model = Transformer.from_pretrained(str(tmp_path / "m"))
    with torch.no_grad():
        model.norm.weight.fill_(2.0)
    model.save_pretrained(tmp_path / "m")
    assert same(Transformer.from_pretrained(tmp_path / "m"), model)
    assert (tmp_path / "m" / "README.md").read_text() == "written by hand"
    assert (tmp_path / "m" / "notes.txt").exists()


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_keeps_old_folder(tmp_path, monkeypatch):
    tiny_transformer(seed=1).save_pretrained(tmp_path / "m")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    for target in ("llamagen.models.pretrained.save_file", "llamagen.support.storage.write_json"):
        with monkeypatch.context() as patch:
            patch.setattr(target, full_disk)
            with pytest.raises(OSError, match="No space left"):
                tiny_transformer(seed=2).save_pretrained(tmp_path / "m")
            with pytest.raises(OSError, match="No space left"):
                tiny_transformer(seed=2).save_pretrained(tmp_path / "new")
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert same(Transformer.from_pretrained(tmp_path / "m"), tiny_transformer(seed=1))


def test_a_disk_that_is_really_full(tmp_path):
    """safetensors has an exception of its own for it, which must come out as the OSError it is."""
    if sys.platform != "linux":
        pytest.skip("needs limits on file sizes")
    code = """
import resource, sys
from tests.tiny_models import tiny_transformer
model = tiny_transformer(dim=128, hidden_dim=512)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    model.save_pretrained(sys.argv[1])
except OSError as error:
    print(error.errno, error.filename)
"""
    folder = tmp_path / "m"
    arguments = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    number, name = done.stdout.split()
    assert int(number) == errno.EFBIG
    assert name.endswith("model.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [0, 5, 100, 2000, -1])
def test_truncated_weights(tmp_path, length):
    tiny_transformer().save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match="is truncated or not a safetensors file") as error:
        Transformer.from_pretrained(tmp_path / "m")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_do_not_depend_on_the_file_afterwards(tmp_path):
    tiny_transformer().save_pretrained(tmp_path / "m")
    loaded = Transformer.from_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
        file.truncate(10)
    assert same(loaded, tiny_transformer())


def test_rejects_other_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub repository"):
        Transformer.from_pretrained(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        Transformer.from_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path / "v")
    with pytest.raises(InputError, match="describes image tokenizer, expected transformer"):
        Transformer.from_pretrained(tmp_path / "v")
    (tmp_path / "v" / "config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        ImageTokenizer.from_pretrained(tmp_path / "v")


def test_a_misspelt_option_is_not_ignored(tmp_path):
    tiny_transformer().save_pretrained(tmp_path / "m")
    with pytest.raises(TypeError, match="torch_dtype"):
        Transformer.from_pretrained(tmp_path / "m", torch_dtype=torch.bfloat16)


def test_saving_and_pushing_in_one_call(tmp_path, monkeypatch):
    """The upload itself is cut off here; tests/checkpoints/test_hub.py goes through with it."""
    pushed = []

    def push(self, repo_id, **options):
        pushed.append((repo_id, options))
        return "https://hub/commit/1"

    monkeypatch.setattr(pretrained.PretrainedModel, "push_to_hub", push)
    model = tiny_transformer()
    address = model.save_pretrained(tmp_path / "mine", push_to_hub=True, private=True)
    assert address == "https://hub/commit/1"
    model.save_pretrained(tmp_path / "mine", repo_id="me/other", push_to_hub=True)
    assert pushed == [("mine", {"private": True}), ("me/other", {})]
    assert (tmp_path / "mine" / "config.json").exists()


@pytest.mark.gpu
def test_onto_the_gpu(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    loaded = ImageTokenizer.from_pretrained(tmp_path / "m", device="cuda", dtype=torch.bfloat16)
    assert loaded.device.type == "cuda"
    assert same(loaded.cpu(), tiny_tokenizer().bfloat16())


def test_eval_mode_is_taken_back_part_by_part():
    model = tiny_tokenizer().train()
    model.encoder.eval()
    before = [part.training for part in model.modules()]
    with eval_mode(model):
        assert not any(part.training for part in model.modules())
    assert [part.training for part in model.modules()] == before
    assert {True, False} <= set(before)


def test_an_extra_weight_is_named_as_extra(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), "decoder.more": torch.zeros(2)}, path)
    with pytest.raises(InputError, match=r"weight decoder\.more is extra"):
        ImageTokenizer.from_pretrained(tmp_path)


def test_fingerprint():
    others = [tiny_tokenizer(1), tiny_tokenizer(0, codebook_l2_norm=False), tiny_transformer()]
    changed = tiny_tokenizer(0)
    with torch.no_grad():
        changed.decoder.conv_out.bias[0] += 1e-6
    models = [tiny_tokenizer(0), tiny_tokenizer(0), changed, *others]
    assert len({model.fingerprint() for model in models}) == 5


def sharded(folder, parts: int) -> list[str]:
    """Split the weights of a model folder into shards, as other programs save large models."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{part + 1:05d}-of-{parts:05d}.safetensors" for part in range(parts)]
    home = {key: names[index % parts] for index, key in enumerate(weights)}
    for name in names:
        save_file({key: weights[key] for key in weights if home[key] == name}, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": home}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return names


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_shards(tmp_path, make):
    model = make()
    model.save_pretrained(tmp_path / "m")
    names = sharded(tmp_path / "m", 3)
    assert same(type(model).from_pretrained(tmp_path / "m"), model)
    # A single file, once it is there, is the newer one.
    other = make(seed=1)
    other.save_pretrained(tmp_path / "m")
    assert same(type(model).from_pretrained(tmp_path / "m"), other)
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / names[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{names[1]} does not exist"):
        type(model).from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{}", "names no shards"),
        ('{"weight_map": {}}', "names no shards"),
        ('{"weight_map": {"a": 1}}', "names no shards"),
        ('{"weight_map": {"a": "../m/x.safetensors"}}', "names no shards"),
        ('{"weight_map"', "not valid JSON"),
    ],
)
def test_damaged_index_of_shards(tmp_path, index, message):
    tiny_transformer().save_pretrained(tmp_path / "m")
    sharded(tmp_path / "m", 2)
    (tmp_path / "m" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=message):
        Transformer.from_pretrained(tmp_path / "m")


def test_a_weight_in_no_shard(tmp_path):
    tiny_transformer().save_pretrained(tmp_path / "m")
    names = sharded(tmp_path / "m", 2)
    weights = load_file(tmp_path / "m" / names[0])
    weights.pop("norm.weight", None)
    save_file(dict(list(weights.items())[1:]), tmp_path / "m" / names[0])
    with pytest.raises(InputError, match="is missing"):
        Transformer.from_pretrained(tmp_path / "m")
