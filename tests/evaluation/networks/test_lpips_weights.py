"""The files of LPIPS, with weights of the true shapes, and where they come from."""

from __future__ import annotations

import errno
import hashlib
import io
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llamagen.evaluation.networks import lpips
from llamagen.evaluation.networks.lpips import (
    FILE_NAME,
    HEADS_FILE,
    TRUNK_FILE,
    Lpips,
    load_lpips,
    save_lpips,
)
from llamagen.evaluation.networks.weights import PublicFile
from llamagen.support.errors import InputError
from llamagen.support.storage import cache_folder
from tests.evaluation.networks.helpers import Malicious, lpips_shapes, one_line, same, saved


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {k: torch.rand(shape, generator=generator) * 0.1 for k, shape in shapes.items()}


def constant(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Of these shapes too, but small in a file: all of a tensor is one stored number."""
    return {k: torch.full((1,), 0.01).expand(shape) for k, shape in shapes.items()}


CLASSIFIER = {"classifier.0.weight": torch.ones(2, 2), "classifier.0.bias": torch.ones(2)}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return drawn(lpips_shapes())


def write_pair(folder: Path, weights: dict[str, Tensor], *, legacy: bool = False) -> None:
    trunk = {name: tensor for name, tensor in weights.items() if name.startswith("features")}
    heads = {name: tensor for name, tensor in weights.items() if name.startswith("lin")}
    folder.mkdir(exist_ok=True)
    for name, content in ((TRUNK_FILE.name, {**trunk, **CLASSIFIER}), (HEADS_FILE.name, heads)):
        torch.save(content, folder / name, _use_new_zipfile_serialization=not legacy)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_loads_the_public_files(tmp_path, weights, legacy):
    write_pair(tmp_path, weights, legacy=legacy)
    random_numbers = torch.get_rng_state()
    model = load_lpips(tmp_path)
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert same(model, weights)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}
    # What happens to the files afterwards does not matter.
    for path in tmp_path.iterdir():
        with path.open("r+b") as file:
            file.write(b"\xff" * path.stat().st_size)
            file.truncate(100)
    assert same(model, weights)
    with torch.no_grad():
        assert (model(torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)) > 0).all()


def test_loads_one_file_with_all_weights(tmp_path, weights):
    write_pair(tmp_path / "pair", weights)
    path = tmp_path / "sub" / FILE_NAME
    save_lpips(load_lpips(tmp_path / "pair"), path)
    assert path.stat().st_size < 60e6
    assert same(load_lpips(path), weights)
    # In a folder it is found, before the pair.
    (path.parent / HEADS_FILE.name).write_bytes(b"")
    (path.parent / TRUNK_FILE.name).write_bytes(b"")
    assert same(load_lpips(path.parent), weights)
    assert same(load_lpips(str(path)), weights)


def test_loads_other_formats(tmp_path):
    shapes = lpips_shapes()
    whole = constant(shapes)
    # All in one pickle, in half precision, under a name that says nothing.
    torch.save({k: t.half() for k, t in whole.items()}, tmp_path / "download")
    model = load_lpips(tmp_path / "download")
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}
    assert same(model, {k: t.half().float() for k, t in whole.items()})
    # Files that were confused with each other hold the same together.
    write_pair(tmp_path, whole)
    heads = (tmp_path / HEADS_FILE.name).rename(tmp_path / "heads")
    (tmp_path / TRUNK_FILE.name).rename(tmp_path / HEADS_FILE.name)
    heads.rename(tmp_path / TRUNK_FILE.name)
    assert same(load_lpips(tmp_path), whole)


def test_names_missing_files(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"absent does not exist; give .* perceptual_weight 0"
    ):
        load_lpips(tmp_path / "absent")
    text = one_line(load_lpips, tmp_path)
    assert f"{HEADS_FILE.name} and {TRUNK_FILE.name} not found" in text
    assert TRUNK_FILE.url in text
    write_pair(tmp_path, constant(lpips_shapes()))
    for name, part in ((TRUNK_FILE.name, "the heads of LPIPS"), (HEADS_FILE.name, "VGG16")):
        path = tmp_path / name
        text = one_line(load_lpips, path)
        assert text.startswith(f"{path} lacks {part}, it holds ")
        content = path.read_bytes()
        path.unlink()
        assert f": {name} not found" in one_line(load_lpips, tmp_path)
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features.0.weight": torch.zeros(1).expand(32, 3, 3, 3)}, r"shape \(32, 3, 3, 3\), exp"),
        ({"features.28.bias": None}, r"weight features\.28\.bias \(512,\) is missing"),
        ({"lin4.model.1.weight": None}, r"lin4\.model\.1\.weight .* is missing"),
        ({"features.30.weight": torch.zeros(2)}, r"there is no weight features\.30\.weight"),
        ({"lin0.model.1.weight": -torch.ones(1).expand(1, 64, 1, 1)}, r"lin0\S+ holds .* below 0"),
        ({"features.2.bias": torch.full((64,), torch.nan)}, r"features\.2\.bias .* finite"),
        ({"features.2.bias": torch.ones(64, dtype=torch.int8)}, r"bias \(torch\.int8\) does not"),
        ({"features.2.bias": "ones"}, r"features\.2\.bias .* is missing"),
    ],
)
def test_rejects_weights_of_another_network(tmp_path, change, message):
    whole = {**constant(lpips_shapes()), **change}
    torch.save({k: v for k, v in whole.items() if v is not None}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=message):
        load_lpips(tmp_path / "a.pth")
    assert str(tmp_path / "a.pth") in one_line(load_lpips, tmp_path / "a.pth")


def test_rejects_files_of_another_kind(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"encoder.conv_in.weight": torch.ones(2)}, path)
    assert "lacks VGG16, it holds encoder.conv_in.weight; give" in one_line(load_lpips, path)
    torch.save({}, path)
    assert "lacks VGG16, it holds no weights; give" in one_line(load_lpips, path)
    torch.save([torch.ones(2)], path)
    assert "holds a list, expected a dictionary" in one_line(load_lpips, path)
    path.write_text("<html>not found</html>")
    assert f"{path} is truncated or not" in one_line(load_lpips, path)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_rejects_truncated_files(tmp_path, weights, form):
    path = tmp_path / "a"
    if form == "safetensors":
        content = saved_whole(tmp_path, weights)
    else:
        content = saved(constant(lpips_shapes()), legacy=form == "legacy")
    for length in (0, 1, 3, 9, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        text = one_line(load_lpips, path)
        assert str(path) in text
        assert "again" in text


def saved_whole(folder: Path, weights: dict[str, Tensor]) -> bytes:
    path = folder / FILE_NAME
    if not path.exists():
        with torch.device("meta"):
            model = Lpips()
        model.load_state_dict(weights, assign=True)
        save_lpips(model, path)
    return path.read_bytes()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", [TRUNK_FILE.name, HEADS_FILE.name])
def test_never_runs_code_in_a_file(tmp_path, name, legacy):
    write_pair(tmp_path, constant(lpips_shapes()))
    witness = tmp_path / "it-ran"
    content = {"lin0.model.1.weight": torch.ones(1), "features.0": Malicious(f"touch {witness}")}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    text = one_line(load_lpips, tmp_path)
    assert f"{tmp_path / name} was not loaded: it asks to run" in text
    assert not witness.exists()


def test_full_disk_leaves_no_file(tmp_path, monkeypatch, weights):
    content = saved_whole(tmp_path, weights)
    model = load_lpips(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_lpips(model, tmp_path / FILE_NAME)
    # The older file is whole.
    assert (tmp_path / FILE_NAME).read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


# Downloads


def test_checksums_equal_the_known_ones():
    # The name of the one says how its checksum begins.
    assert TRUNK_FILE.sha256.startswith("397923af")
    assert TRUNK_FILE.url.endswith(TRUNK_FILE.name)
    assert HEADS_FILE.url.endswith("/v0.1/" + HEADS_FILE.name)
    assert {len(file.sha256) for file in (TRUNK_FILE, HEADS_FILE)} == {64}
    assert {file.url.split(":")[0] for file in (TRUNK_FILE, HEADS_FILE)} == {"https"}


@pytest.fixture
def cache(web, tmp_path, monkeypatch) -> Path:
    """An empty cache; the public files are on ``web``, with small files of true shapes."""
    write_pair(tmp_path / "public", constant(lpips_shapes()))
    files = []
    for name in (HEADS_FILE.name, TRUNK_FILE.name):
        content = web.files[name] = (tmp_path / "public" / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        files.append(PublicFile(name=name, url=f"{web.url}/{name}", sha256=digest))
    monkeypatch.setattr(lpips, "_PUBLIC_FILES", tuple(files))
    monkeypatch.setenv("LLAMAGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache"


def test_downloads_once(web, cache):
    expected = constant(lpips_shapes())
    assert same(load_lpips(), expected)
    assert web.requests == [HEADS_FILE.name, TRUNK_FILE.name]
    assert [path.name for path in cache.iterdir()] == [FILE_NAME]
    web.files.clear()
    assert same(load_lpips(), expected)
    assert len(web.requests) == 2
    # Damaged later, the copy is named, and what to do with it.
    (cache / FILE_NAME).write_bytes(b"12345678{")
    text = one_line(load_lpips)
    assert str(cache / FILE_NAME) in text
    assert "without that file it is downloaded again" in text


@pytest.mark.parametrize("name", [HEADS_FILE.name, TRUNK_FILE.name])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("changed", "gave another file than expected (SHA-256 "),
        ("cut", "more expected"),
        ("absent", "HTTP Error 404: Not Found"),
    ],
)
def test_failed_downloads_leave_no_file(web, cache, name, fault, message):
    if fault == "changed":
        content = web.files[name]
        # Weights like the others, but for one bit.
        web.files[name] = content[:-2000] + bytes([content[-2000] ^ 1]) + content[-1999:]
    elif fault == "cut":
        web.cut_after[name] = 1000
    else:
        del web.files[name]
    text = one_line(load_lpips)
    if fault == "absent":
        assert "not found" in text.lower()
    else:
        assert message in text
    assert f"{web.url}/{name}" in text
    assert "perceptual_weight 0" in text
    assert list(cache.iterdir()) == []


def test_names_a_remedy_without_a_network(cache, monkeypatch):
    # Nobody listens on the port for discarding.
    away = [PublicFile(name="vgg.pth", url="http://127.0.0.1:9/vgg.pth", sha256="0" * 64)]
    monkeypatch.setattr(lpips, "_PUBLIC_FILES", tuple(away))
    text = one_line(load_lpips)
    assert text.startswith("cannot download http://127.0.0.1:9/vgg.pth for the perceptual loss (")
    assert (
        f"give the folder with {TRUNK_FILE.name} ({TRUNK_FILE.url}) and {HEADS_FILE.name}" in text
    )
    assert "or train without LPIPS: perceptual_weight 0" in text
    assert list(cache.iterdir()) == []


def test_names_a_timeout(web, cache, monkeypatch):
    def silent(*_, **__):
        raise TimeoutError("timed out")

    monkeypatch.setattr("urllib.request.urlopen", silent)
    assert "(timed out)" in one_line(load_lpips)


def test_full_disk_while_downloading_leaves_no_file(cache, monkeypatch):
    class Full(io.BytesIO):
        def write(self, *_):
            raise OSError(errno.ENOSPC, "No space left on device")

    opened = Path.open

    def fills_up(path, mode="r", **options):
        return Full() if mode == "wb" else opened(path, mode, **options)

    monkeypatch.setattr(Path, "open", fills_up)
    with pytest.raises(OSError, match="No space left") as error:
        load_lpips()
    assert error.value.errno == errno.ENOSPC
    assert list(cache.iterdir()) == []


def test_rejects_an_unwritable_cache(cache, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LLAMAGEN_CACHE", str(tmp_path / "file" / "cache"))
    text = one_line(load_lpips)
    assert "cannot write to" in text
    assert "LLAMAGEN_CACHE" in text


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LLAMAGEN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "llamagen"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "llamagen"
    monkeypatch.setenv("LLAMAGEN_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"
