"""Data sets of a hub: downloaded, streamed, and missing."""

import os
import subprocess
import sys

from tests.checkpoints.hub_server import Hub, running
from tests.data.sets import scans, write_parquet

SCRIPT = """
from llamagen.data import SourceConfig, open_images
from llamagen.data.streaming import ImageStream
from llamagen.support.errors import InputError

images = open_images("hf:owner/digits")
print(len(images), *images.class_names, images.read(5).size)
print(len(open_images("hf:owner/digits@main", split="validation")))
stream = ImageStream("hf:owner/digits", SourceConfig(streaming=True), batch_size=2, seed=0)
print(stream.parts, len(list(stream.first_images(9))))
try:
    open_images("hf:owner/lost")
except InputError as error:
    print(error)
"""


def test_reads_data_sets_of_a_hub(tmp_path):
    folder = write_parquet(tmp_path / "set", scans(6), files=2)
    write_parquet(folder, scans(8)[6:], split="validation")
    files = {f"data/{path.name}": path.read_bytes() for path in folder.iterdir()}
    with running(Hub(repos={"owner/digits": files})) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        environment["NO_PROXY"] = "127.0.0.1"
        environment.pop("HF_HUB_OFFLINE", None)
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True,
            check=False, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second, third, last = done.stdout.splitlines()
    assert first == "6 zero one two (16, 16)"
    assert second == "2"
    assert third == "2 6"
    assert last.startswith("hf:owner/lost cannot be read as a data set")
    # Downloaded once, then streamed.
    assert len(hub.fetched("data/train-00000-of-00002.parquet")) == 2
