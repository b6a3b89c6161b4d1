"""The files of Inception-v3, with weights of the true shapes, and where they come from."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llamagen.evaluation.networks import inception
from llamagen.evaluation.networks.inception import WEIGHTS_FILE, InceptionV3
from llamagen.evaluation.networks.weights import PublicFile
from llamagen.support.errors import InputError
from tests.evaluation.networks.helpers import Malicious, images, one_line, same, saved, shapes

# Its files


def constant(value: float = 0.01) -> dict[str, Tensor]:
    """Of the true shapes, but small in a file: all of a tensor is one stored number."""
    return {
        name: torch.full((1,), value + 1e-4 * i).expand(shape)
        for i, (name, shape) in enumerate(shapes().items())
    }


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_loads_pickles(tmp_path, legacy):
    weights = constant()
    path = tmp_path / "weights.pth"
    path.write_bytes(saved(weights, legacy=legacy))
    random_numbers = torch.get_rng_state()
    model = InceptionV3.from_weights(path)
    assert torch.equal(torch.get_rng_state(), random_numbers)
    # What happens to the file afterwards does not matter.
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
        file.truncate(100)
    assert same(model, weights)
    assert model.fc.weight.device == torch.device("cpu")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.name.startswith("Inception-v3")


def test_loads_safetensors(network, tmp_path):
    """As safetensors, which converters of public files write as well."""
    path = tmp_path / "weights.safetensors"
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    counters = {"Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(7)}
    save_file({**state, **counters}, path)
    model = InceptionV3.from_weights(str(path))
    assert same(model, network.state_dict())
    batch = images(24, 24, count=1)
    torch.testing.assert_close(model(batch).pool, network(batch).pool)
    assert model.fingerprint == network.fingerprint
    assert model.fingerprint.startswith("inception-2015-12-05/")
    model.Mixed_7c.branch_pool.bn.running_mean[3] += 1e-4
    assert model.fingerprint != network.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"fc.weight": torch.zeros(1).expand(1000, 2048)},
            r"shape \(1000, 2048\), expected \(1008",
        ),
        (
            {"Mixed_6d.branch1x1.bn.bias": None},
            r"Mixed_6d\.branch1x1\.bn\.bias \(192,\) is missing",
        ),
        ({"AuxLogits.fc.bias": torch.zeros(2)}, r"there is no weight AuxLogits\.fc\.bias"),
        ({"fc.bias": torch.full((1008,), torch.nan)}, r"fc\.bias .* finite"),
        ({"fc.bias": torch.ones(1008, dtype=torch.int8)}, r"fc\.bias \(torch\.int8\) does not"),
    ],
)
def test_rejects_weights_of_another_network(tmp_path, change, message):
    whole = {**constant(), **change}
    path = tmp_path / "a.pth"
    path.write_bytes(saved({k: v for k, v in whole.items() if v is not None}))
    with pytest.raises(InputError, match=message):
        InceptionV3.from_weights(path)
    text = one_line(InceptionV3.from_weights, path)
    assert str(path) in text
    assert f"give the path of {WEIGHTS_FILE.name} ({WEIGHTS_FILE.url})" in text


def test_rejects_files_of_another_kind(tmp_path):
    path = tmp_path / "a.pth"
    witness = tmp_path / "it-ran"
    for content, message in (
        (saved([torch.ones(2)]), "holds a list, expected a dictionary"),
        (saved({}), "is missing"),
        (b"<html>not found</html>", "is truncated or not"),
        (b"", "is truncated or not"),
        (saved({"fc.bias": Malicious(f"touch {witness}")}), "was not loaded: it asks to run"),
    ):
        path.write_bytes(content)
        text = one_line(InceptionV3.from_weights, path)
        assert f"{path}" in text
        assert message in text
        assert WEIGHTS_FILE.url in text
    assert not witness.exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_rejects_truncated_files(tmp_path, legacy):
    path = tmp_path / "a.pth"
    content = saved(constant(), legacy=legacy)
    for length in (1, 9, 1000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        text = one_line(InceptionV3.from_weights, path)
        assert str(path) in text
        assert "again" in text


def test_names_missing_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for source in (tmp_path / "absent.pth", "absent.pth", "folder", "folder/sub/a.pth", ""):
        text = one_line(InceptionV3.from_weights, source)
        assert "does not exist" in text
        assert str(source) in text
        assert f"give the path of {WEIGHTS_FILE.name} ({WEIGHTS_FILE.url})" in text


# Where they come from


def test_checksum_equals_the_known_one():
    assert WEIGHTS_FILE.sha256.startswith("6726825d")
    assert len(WEIGHTS_FILE.sha256) == 64
    assert WEIGHTS_FILE.url.startswith("https://")
    assert WEIGHTS_FILE.url.endswith("/" + WEIGHTS_FILE.name)


def located(source: str | Path | None = None) -> bytes:
    """The file that is loaded, without building the network."""
    return inception._locate(source).read_bytes()


@pytest.fixture
def cache(web, tmp_path, monkeypatch) -> Path:
    """An empty cache; the public file is on ``web``, of true shapes but small."""
    content = web.files[WEIGHTS_FILE.name] = saved(constant())
    public = PublicFile(
        name=WEIGHTS_FILE.name,
        url=f"{web.url}/{WEIGHTS_FILE.name}",
        sha256=hashlib.sha256(content).hexdigest(),
    )
    monkeypatch.setattr(inception, "WEIGHTS_FILE", public)
    monkeypatch.setenv("LLAMAGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache"


def test_downloads_once(web, cache):
    assert located() == saved(constant())
    assert [path.name for path in cache.iterdir()] == [WEIGHTS_FILE.name]
    web.files.clear()
    assert located() == saved(constant())
    assert web.requests == [WEIGHTS_FILE.name]
    # Damaged later, the copy is named, and what to do with it.
    path = cache / WEIGHTS_FILE.name
    content = path.read_bytes()
    path.write_bytes(content[:-2000] + bytes([content[-2000] ^ 1]) + content[-1999:])
    text = one_line(InceptionV3.from_weights)
    assert f"{path} is damaged" in text
    assert "without that file it is downloaded again" in text


def test_finds_the_file_of_torch_hub(web, cache, tmp_path):
    shared = tmp_path / "torch" / "hub" / "checkpoints" / WEIGHTS_FILE.name
    shared.parent.mkdir(parents=True)
    shared.write_bytes(web.files.pop(WEIGHTS_FILE.name))
    assert located() == saved(constant())
    assert web.requests == []
    assert not cache.exists()
    shared.write_bytes(b"")
    text = one_line(InceptionV3.from_weights)
    assert f"{shared} is damaged" in text
    assert "or remove it" in text


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("changed", "gave another file than expected (SHA-256 "),
        ("cut", "more expected"),
        ("absent", "(Not Found)"),
    ],
)
def test_failed_downloads_leave_no_file(web, cache, fault, message):
    name = WEIGHTS_FILE.name
    if fault == "changed":
        web.files[name] = web.files[name][:-1] + b"?"
    elif fault == "cut":
        web.cut_after[name] = 1000
    else:
        del web.files[name]
    text = one_line(InceptionV3.from_weights)
    assert message in text
    assert f"{web.url}/{name}" in text
    assert "give the path of" in text
    assert list(cache.iterdir()) == []


def test_rejects_an_unwritable_cache(cache, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LLAMAGEN_CACHE", str(tmp_path / "file" / "cache"))
    text = one_line(InceptionV3.from_weights)
    assert "cannot write to" in text
    assert "for the features of FID (LLAMAGEN_CACHE)" in text


def test_public_name_demands_the_public_content(web, cache, tmp_path):
    path = tmp_path / "mine" / WEIGHTS_FILE.name
    path.parent.mkdir()
    path.write_bytes(web.files[WEIGHTS_FILE.name])
    for source in (path, path.parent, str(path)):
        assert located(source) == saved(constant())
    path.write_bytes(saved(constant(0.5)))
    text = one_line(InceptionV3.from_weights, path)
    assert f"{path} is damaged or another file than its name says (SHA-256 " in text
    # Under another name it is what it is.
    other = path.rename(path.with_name("other.pth"))
    assert located(other) == saved(constant(0.5))


def test_downloads_from_other_addresses(web, cache):
    mirror = f"{web.url}/mirror/{WEIGHTS_FILE.name}"
    web.files[f"mirror/{WEIGHTS_FILE.name}"] = web.files.pop(WEIGHTS_FILE.name)
    assert located(mirror) == saved(constant())
    # Which is the public file, so nothing more has to be downloaded.
    assert located() == saved(constant())
    for place, value in (("one", 0.3), ("two", 0.4)):
        web.files[f"{place}/own.pth"] = saved(constant(value))
        for _ in range(2):
            assert located(f"{web.url}/{place}/own.pth") == saved(constant(value))
    assert len(web.requests) == 3
    assert f"cannot download {web.url}/no.pth" in one_line(
        InceptionV3.from_weights, f"{web.url}/no.pth"
    )


def test_finds_files_on_the_hub(tmp_path, monkeypatch):
    asked = []

    def download(repo: str, file: str) -> Path:
        asked.append((repo, file))
        path = tmp_path / "download.pth"
        path.write_bytes(saved(constant()))
        return path

    with monkeypatch.context() as patch:
        patch.setattr(inception, "download_file", download)
        assert located("some-one/networks/2015/a.pth") == saved(constant())
    assert asked == [("some-one/networks", "2015/a.pth")]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = one_line(InceptionV3.from_weights, "nobody/nothing/a.pth")
    assert "a.pth of nobody/nothing is not on this machine" in text
    assert "HF_HUB_OFFLINE is set" in text
