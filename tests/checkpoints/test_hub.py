"""Downloads and uploads, against a server on this machine that speaks the hub's protocol.

huggingface_hub reads its environment when it is imported, so each client is a process of its own.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch

from tests import forked
from tests.checkpoints.hub_server import COMMIT, Hub, running
from tests.models.test_pretrained import sharded
from tests.tiny_models import tiny_pipeline, tiny_transformer

PREAMBLE = """
import dataclasses, sys, torch
from llamagen import checkpoints
from llamagen.checkpoints import names
from llamagen.config import TRANSFORMER_PRESETS
from llamagen.support.errors import InputError
from llamagen.pipeline import Pipeline
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.models.transformer import Transformer
from tests.tiny_models import tiny_pipeline, tiny_transformer

def same(a, b):
    other = b.state_dict()
    assert all(torch.equal(t, other[k]) for k, t in a.state_dict().items())

def refused(call, *arguments, **keywords):
    try:
        call(*arguments, **keywords)
    except InputError as error:
        print(error)
    else:
        print("not refused")

# A published model of a size for tests.
TRANSFORMER_PRESETS["tiny"] = dataclasses.replace(tiny_transformer().config, grid=(2, 2))
names.PUBLIC_MODELS += (
    names.PublicModel(name="c2i-tiny", repo="owner/models", file="c2i_tiny.pt", preset="tiny",
                      grid=(4, 4), tokenizer="vq-16"),
    names.PublicModel(name="c2i-lost", repo="owner/models", file="lost.pt", preset="tiny"),
)
"""


@pytest.fixture
def hub():
    with running(Hub()) as hub:
        yield hub


@pytest.fixture
def home(tmp_path) -> Path:
    """The HF_HOME of the clients."""
    return tmp_path / "hf"


@pytest.fixture
def client(hub, home):
    """Runs Python code whose hub is the stand-in, or what ``environment`` says; returns lines."""

    def run(code: str, **environment: str) -> list[str]:
        variables = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))},
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            **environment,
        }
        log = home.with_name("log")
        process = forked.start("tests.forked", "execute", PREAMBLE + code, variables, log=log)
        process.join(100)
        assert process.exitcode == 0, log.with_suffix(".err").read_text()
        return log.read_text().splitlines()

    return run


def published(model, padding: int = 0) -> bytes:
    file = io.BytesIO()
    optimizer = torch.zeros(padding, dtype=torch.uint8)
    torch.save({"model": model.state_dict(), "optimizer": optimizer}, file)
    return file.getvalue()


def folder_files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_resumes_interrupted_download(hub, client, home):
    content = published(tiny_transformer(), padding=24 * 2**20)
    hub.repos["owner/models"] = {"c2i_tiny.pt": content}
    hub.cut_after["c2i_tiny.pt"] = 22 * 2**20
    # Old versions of huggingface_hub give up, and go on when asked again.
    load = """
try:
    model = checkpoints.load_transformer("C2I-Tiny")
except InputError as error:
    assert "failed" in str(error) and "try again" in str(error), error
    model = checkpoints.load_transformer("C2I-Tiny")
same(model, tiny_transformer())
print(model.config.grid)
"""
    assert client(load) == ["(4, 4)"]
    first, second = hub.fetched("c2i_tiny.pt")
    assert first is None
    # It writes in pieces of 10 MiB; of what arrived, whole pieces at least are kept.
    assert int(second.removeprefix("bytes=").removesuffix("-")) >= 20 * 2**20
    (stored,) = [p for p in (home / "hub").rglob("blobs/*") if p.is_file()]
    assert stored.read_bytes() == content
    # What was downloaded is there without a network, what was not is missed in one line.
    hub.requests.clear()
    code = """
refused(checkpoints.load_transformer, "c2i-lost")
refused(checkpoints.resolve_pipeline, "owner/others")
refused(ImageTokenizer.from_pretrained, "owner/others")
"""
    grid, *lines = client(load + code, HF_HUB_OFFLINE="1")
    assert grid == "(4, 4)"
    assert len(lines) == 3
    for line in lines:
        assert "is not on this machine" in line
        assert "HF_HUB_OFFLINE is set; unset it" in line
    assert hub.requests == []


def test_downloads_shards(hub, client, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "m")
    names = sharded(tmp_path / "m" / "transformer", 2)
    hub.repos["owner/pipeline"] = folder_files(tmp_path / "m")
    hub.repos["owner/transformer"] = folder_files(tmp_path / "m" / "transformer")
    client("""
same(Pipeline.from_pretrained("owner/pipeline", device="cpu").transformer, tiny_transformer())
same(Transformer.from_pretrained("owner/transformer"), tiny_transformer())
same(checkpoints.load_transformer("owner/transformer"), tiny_transformer())
""")
    assert all(hub.fetched(f"transformer/{name}") and hub.fetched(name) for name in names)


def test_failed_download_is_one_line(hub, client):
    hub.repos["owner/models"] = {"notes.txt": b"no model"}
    hub.gated.add("owner/secret")
    lines = client("""
refused(checkpoints.load_transformer, "c2i-lost")
refused(checkpoints.load_tokenizer, "owner/absent")
refused(checkpoints.load_tokenizer, "owner/secret")
refused(checkpoints.load_tokenizer, "owner/models")
refused(checkpoints.resolve_pipeline, "owner/absent")
refused(Transformer.from_pretrained, "owner/absent")
""")
    assert len(lines) == 6
    assert "the hub does not have lost.pt of owner/models" in lines[0]
    for line in (lines[1], lines[4], lines[5]):
        assert "there is no repository owner/absent on the hub" in line
        assert hub.url in line
    assert "accept its terms" in lines[2]
    assert "owner/models on the hub is no model folder" in lines[3]


def test_unreachable_server_is_one_line(client):
    # Retries with growing pauses would make it half a minute; that they end is what matters here.
    code = """
import time
time.sleep = lambda seconds: None
refused(checkpoints.load_transformer, "c2i-tiny")
refused(checkpoints.resolve_pipeline, "owner/models")
"""
    lines = client(code, HF_ENDPOINT="http://127.0.0.1:9")
    assert len(lines) == 2
    for line in lines:
        assert "http://127.0.0.1:9 did not answer as a hub does; check the network" in line


def test_loads_folders_from_hub(hub, client, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    hub.repos["owner/pipeline"] = folder_files(tmp_path / "pipeline")
    hub.repos["owner/pipeline"]["training/state.safetensors"] = b"not needed"
    hub.repos["owner/model"] = folder_files(tmp_path / "pipeline" / "transformer")
    lines = client("""
expected = tiny_pipeline()
same(checkpoints.load_tokenizer("owner/pipeline"), expected.tokenizer)
print("tokenizer")
found = checkpoints.resolve_pipeline("owner/pipeline")
print(found.name, len(found.labels), found.folder == found.tokenizer.parent)
same(checkpoints.load_transformer(found.transformer), expected.transformer)
same(checkpoints.load_transformer("owner/model"), expected.transformer)
half = Transformer.from_pretrained("owner/model", dtype=torch.bfloat16)
print(half.dtype, half.training)
same(half, expected.transformer.bfloat16())
print(checkpoints.resolve_pipeline("owner/model").name)
""")
    assert lines == [
        "tokenizer",
        "tiny 5 True",
        "torch.bfloat16 False",
        "owner/model",
    ]
    weights = [p for _, p, _ in hub.requests if p.endswith(".safetensors")]
    # Each file was fetched once, the tokenizer's before the transformer's was needed at all.
    assert "tokenizer" in weights[0]
    assert not any("training" in path for path in weights)
    for repo in ("pipeline", "model"):
        path = f"owner/{repo}/resolve/{COMMIT}/"
        name = "transformer/model.safetensors" if repo == "pipeline" else "model.safetensors"
        assert len(hub.fetched(path + name)) == 1


def test_pushes_to_hub(hub, client):
    lines = client("""
address = tiny_transformer().push_to_hub("owner/pushed", token="hf_test")
print(address)
same(Transformer.from_pretrained("owner/pushed"), tiny_transformer())
""")
    assert lines[0].startswith(f"{hub.url}/owner/pushed/")
    assert set(hub.repos["owner/pushed"]) >= {"config.json", "model.safetensors", "README.md"}
    assert b'"kind": "transformer"' in hub.repos["owner/pushed"]["config.json"]
