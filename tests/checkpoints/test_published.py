"""Dialects of checkpoint files are read; damaged or dangerous ones are refused."""

from __future__ import annotations

import collections
import os
import pickle
import random
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from llamagen.checkpoints import load_model, load_tokenizer, load_transformer, read_checkpoint
from llamagen.support.errors import InputError
from tests.checkpoints.files import ARGUMENTS, prefixed, same_weights, tokenizer, transformer

DIALECTS = {
    "ddp": lambda s: {"model": s, "optimizer": {"state": {0: torch.ones(3)}}, "steps": 7},
    "deepspeed": lambda s: {"module": s, "ds_version": "0.14"},
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "flat": lambda s: s,
    "only an average": lambda s: {"ema": s},
    "ordered": collections.OrderedDict,
    "compiled": lambda s: {"model": prefixed(s, "_orig_mod.")},
    "compiled, then DDP": lambda s: {"model": prefixed(s, "module._orig_mod.")},
    "DDP, then compiled": lambda s: prefixed(s, "_orig_mod.module."),
    "DDP in DDP": lambda s: {"module": prefixed(s, "module.module.")},
    "parts compiled": lambda s: {
        name.replace("attention.", "attention._orig_mod."): tensor for name, tensor in s.items()
    },
    "parameters": lambda s: {name: torch.nn.Parameter(tensor) for name, tensor in s.items()},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_reads_dialects(tmp_path, dialect, legacy):
    # A name that says nothing.
    path = tmp_path / "download"
    for model, load in ((transformer(), load_transformer), (tokenizer(), load_tokenizer)):
        content = DIALECTS[dialect](model.state_dict())
        if not isinstance(content, collections.OrderedDict):
            content = {**content, "args": ARGUMENTS}
        elif model.kind == "transformer":
            continue  # Nothing tells the number of its heads.
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        loaded = load(path) if model.kind == "image tokenizer" else load(path, heads=4)
        assert same_weights(loaded, model)
        assert not loaded.training


def test_keeps_arguments_only(tmp_path):
    state = {**tokenizer().state_dict(), "quantize.codebook_used": torch.zeros(65536)}
    discriminator = {"main.0.weight": torch.ones(2)}
    content = {"model": state, "discriminator": discriminator, "args": ARGUMENTS}
    torch.save(content, tmp_path / "a.pt")
    checkpoint = read_checkpoint(tmp_path / "a.pt")
    assert checkpoint.kind == "image tokenizer"
    assert checkpoint.arguments == vars(ARGUMENTS)
    assert set(checkpoint.shapes) == set(tokenizer().state_dict())
    torch.save({"model": state, "args": vars(ARGUMENTS)}, tmp_path / "a.pt")
    assert read_checkpoint(tmp_path / "a.pt").arguments == vars(ARGUMENTS)


def test_reads_ema_of_tokenizers_only(tmp_path):
    path = tmp_path / "a.pt"
    content = {"model": tokenizer(seed=1).state_dict(), "ema": tokenizer(seed=2).state_dict()}
    torch.save(content, path)
    assert same_weights(load_tokenizer(path), tokenizer(seed=2))
    torch.save({**content, "ema": {}}, path)
    assert same_weights(load_tokenizer(path), tokenizer(seed=1))
    content = {"ema": transformer(seed=2).state_dict(), "model": transformer(seed=1).state_dict()}
    torch.save(content, path)
    assert same_weights(load_transformer(path, heads=4), transformer(seed=1))


def test_reads_safetensors(tmp_path):
    path = tmp_path / "a.bin"
    state = {**tokenizer().state_dict(), "quantize.codebook_used": torch.zeros(4)}
    save_file(prefixed(state, "module."), path)
    assert same_weights(load_tokenizer(path), tokenizer())
    save_file(prefixed(transformer().state_dict(), "_orig_mod."), path)
    loaded = load_transformer(path, heads=4, grid=(3, 5))
    assert same_weights(loaded, transformer())
    assert loaded.config.grid == (3, 5)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_tables_and_caches_are_no_weights(tmp_path, suffix, caplog):
    extra = ("freqs_cis", "layers.0.attention.kv_cache.k_cache")
    state = transformer().state_dict() | {name: torch.zeros(2) for name in extra}
    (save_file if suffix == ".safetensors" else torch.save)(state, tmp_path / f"a{suffix}")
    assert same_weights(load_transformer(tmp_path / f"a{suffix}", heads=4), transformer())
    for name in extra:
        assert f"{name} is extra: it is no weight, and left out" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_precision(tmp_path, dtype):
    path = tmp_path / "a.pt"
    torch.save(transformer().state_dict(), path)
    loaded = load_transformer(path, heads=4, dtype=dtype)
    assert loaded.dtype == dtype
    assert same_weights(loaded, transformer().to(dtype))
    torch.save(transformer().to(dtype).state_dict(), path)
    assert load_transformer(path, heads=4).dtype == dtype


def test_weights_do_not_depend_on_file(tmp_path):
    """Neither overwritten nor truncated under a running program does it matter."""
    path = tmp_path / "a.pt"
    torch.save(transformer().state_dict(), path)
    loaded = load_transformer(path, heads=4)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
        file.truncate(100)
    assert same_weights(loaded, transformer())


def test_reads_views_of_one_storage(tmp_path):
    state = transformer().state_dict()
    joined = torch.cat([state["norm.weight"], state["layers.0.ffn_norm.weight"]])
    state["norm.weight"], state["layers.0.ffn_norm.weight"] = joined.split(32)
    state["output.weight"] = state["output.weight"].T.contiguous().T
    torch.save(state, tmp_path / "a.pt")
    assert same_weights(load_transformer(tmp_path / "a.pt", heads=4), transformer())


class Malicious:
    """Pickled, it asks whoever unpickles it to run a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_does_not_run_code(tmp_path, form):
    path, witness = tmp_path / "a.pt", tmp_path / "it-ran"
    content = {"model": transformer().state_dict(), "args": Malicious(f"touch {witness}")}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps({"model": Malicious(f"touch {witness}")}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    for load in (load_transformer, load_tokenizer, load_model, read_checkpoint):
        with pytest.raises(InputError) as error:
            load(path)
        assert f"{path} was not loaded: it asks to run" in str(error.value)
        assert "system" in str(error.value)
        assert "\n" not in str(error.value)
    assert not witness.exists()
    # The file is what it claims to be: read carelessly, it would have run.
    if form == "plain pickle":
        pickle.loads(path.read_bytes())
        assert witness.exists()


def test_rejects_classes_other_than_namespace(tmp_path):
    torch.save({"model": transformer(), "when": random.Random(0)}, tmp_path / "a.pt")
    name = r"llamagen\.models\.transformer\.model\.Transformer"
    with pytest.raises(InputError, match=f"asks to run {name}"):
        load_transformer(tmp_path / "a.pt")


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_rejects_truncated_file(tmp_path, form):
    whole, path = tmp_path / "whole", tmp_path / "a.pt"
    if form == "safetensors":
        save_file(tokenizer().state_dict(), whole)
    else:
        content = {"model": tokenizer().state_dict(), "args": ARGUMENTS}
        torch.save(content, whole, _use_new_zipfile_serialization=form == "zip")
    content = whole.read_bytes()
    for length in (0, 1, 3, 9, 100, 1000, len(content) // 2, len(content) - 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(InputError) as error:
            load_tokenizer(path)
        assert str(path) in str(error.value)
        assert "again" in str(error.value)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 400 + len(str(path))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_rejects_or_reads_corrupt_file(tmp_path, form):
    """Flipped bits among the weights cannot be told from weights; anything else is refused."""
    whole, path = tmp_path / "whole", tmp_path / "a.pt"
    # Little of the file is weights.
    state = {n: t.flatten()[:1].clone() for n, t in transformer(layers=1).state_dict().items()}
    if form == "safetensors":
        save_file(state, whole)
    else:
        torch.save(state, whole, _use_new_zipfile_serialization=form == "zip")
    content = whole.read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)
        refused += not readable(path)
    assert refused > 20


def readable(path) -> bool:
    try:
        for _, read in read_checkpoint(path).tensors:
            read().float().sum()
    except InputError:
        return False
    return True


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "it begins with b'<!DOCTYPE html>"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"", "it is empty"),
        (b"PK\x03\x04" + bytes(200), "truncated or not a checkpoint"),
        (b"\x80\x02}q\x00.", "truncated or not a checkpoint"),
    ],
)
def test_rejects_other_files(tmp_path, content, message):
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        load_tokenizer(path)
    assert message in str(error.value)
    assert "download it again" in str(error.value)


def test_rejects_zip_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("notes.txt", "hello")
    with pytest.raises(InputError, match="not a checkpoint"):
        load_tokenizer(tmp_path / "a.zip")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"conv1.weight": torch.ones(2), "bn1.weight": torch.ones(2), "fc.bias": torch.ones(2)},
            "nor a transformer of this architecture: it holds conv1.weight, bn1.weight, fc.bias",
        ),
        (
            {"state_dict": {f"blocks.{i}.w": torch.ones(2) for i in range(5)}},
            "it holds blocks.0.w, blocks.1.w, blocks.2.w, ...",
        ),
        # Llama's own names, which differ in the attention.
        (
            {
                "tok_embeddings.weight": torch.ones(4, 4),
                "layers.0.attention.wq.weight": torch.ones(4),
            },
            "neither an image tokenizer nor a transformer",
        ),
        ({}, "it is empty"),
        ([torch.ones(2)], "holds a list, expected a dictionary of weights"),
        (torch.ones(2), "holds a Tensor, expected a dictionary of weights"),
    ],
)
def test_rejects_other_architectures(tmp_path, content, message):
    path = tmp_path / "a.pt"
    torch.save(content, path)
    for load in (load_model, load_tokenizer, load_transformer):
        with pytest.raises(InputError) as error:
            load(path)
        assert message in str(error.value)


def test_rejects_other_model(tmp_path):
    torch.save(transformer().state_dict(), tmp_path / "t.pt")
    torch.save(tokenizer().state_dict(), tmp_path / "v.pt")
    with pytest.raises(InputError, match=r"t\.pt holds another model \(transformer\)"):
        load_tokenizer(tmp_path / "t.pt")
    with pytest.raises(InputError, match=r"v\.pt holds another model \(image tokenizer\)"):
        load_transformer(tmp_path / "v.pt")
    assert load_model(tmp_path / "t.pt", heads=4).kind == "transformer"
    assert load_model(tmp_path / "v.pt").kind == "image tokenizer"


def test_names_first_weight_that_differs(tmp_path):
    path = tmp_path / "a.pt"
    for name, change, message in (
        ("layers.1.feed_forward.w2.weight", torch.ones(3, 3), r"has shape \(3, 3\), expected"),
        ("layers.1.ffn_norm.weight", None, "is missing"),
        ("layers.0.extra", torch.ones(1), "there is no weight"),
        ("layers.0.attention.wo.weight", torch.ones(32, 32, dtype=torch.int8), "torch.int8"),
    ):
        state = transformer().state_dict()
        if change is None:
            del state[name]
        else:
            state[name] = change
        torch.save(state, path)
        with pytest.raises(InputError, match=message) as error:
            load_transformer(path, heads=4)
        assert name in str(error.value)
        assert str(path) in str(error.value)


def test_rejects_one_weight_under_two_names(tmp_path):
    state = transformer().state_dict()
    state["module.norm.weight"] = state["norm.weight"]
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"two weights norm\.weight, as norm\.weight and module"):
        load_transformer(tmp_path / "a.pt", heads=4)
