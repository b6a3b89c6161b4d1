"""``llamagen serve --engine vllm`` as a process."""

import base64
import concurrent.futures
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from llamagen import Pipeline
from tests.tiny_models import tiny_pipeline, tiny_text_pipeline
from tests.vllm_plugin.conftest import SECOND_RUNNER

pytest.importorskip("vllm")
pytestmark = pytest.mark.skipif(
    SECOND_RUNNER, reason="Triton's interpreter is set up in this process only"
)

COMMAND = [
    *(sys.executable, "-m", "llamagen", "serve", "--engine", "vllm", "--port", "0"),
    *("--dtype", "float32", "--batch-size", "8"),
]


@pytest.fixture
def serve():
    """Starts servers in process groups of their own; returns process and URL."""
    started = []

    def start(*arguments):
        process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            start_new_session=True,
        )
        started.append(process)
        for line in process.stdout:
            if match := re.search(r"http://[\d.]+:\d+", line):
                return process, match[0]
        raise AssertionError(process.stderr.read())

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr.close()


def ask(url, **body):
    return httpx.post(f"{url}/v1/images/generations", json=body, timeout=120)


def accepted(url) -> float:
    """Return the number of images that were made or are being made."""
    names = ("llamagen_images_total{", "llamagen_images_in_flight{")
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(names))


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))).convert("RGB"))


def drawn(pipe, prompt, **settings):
    return np.asarray(pipe(prompt, **settings).images[0])


def assert_same(image, expected):
    """Up to rounding: the decoder has another number of images at once."""
    np.testing.assert_allclose(image.astype(int), expected.astype(int), atol=1)


def test_images_streams_and_sigterm_under_load(serve, tmp_path):
    tiny_pipeline(grid=(20, 20)).save_pretrained(tmp_path / "classes")
    pipe = Pipeline.from_pretrained(tmp_path / "classes", dtype="float32")
    process, url = serve("--model", str(tmp_path / "classes"))
    settings = {"guidance_scale": 3.0, "top_k": 20}
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        asked = [
            pool.submit(ask, url, prompt="dog", seed=seed, n=2, **settings) for seed in (1, 3, 5)
        ]
        against = pool.submit(
            ask, url, prompt="dog", negative_prompt="cat", seed=9, guidance_scale=4.0
        )
        answers = [each.result().raise_for_status().json() for each in asked]
        assert [[data["seed"] for data in answer["data"]] for answer in answers] == [
            [1, 2],
            [3, 4],
            [5, 6],
        ]
        for data in (data for answer in answers for data in answer["data"]):
            expected = drawn(pipe, "dog", seed=data["seed"], **settings)
            assert_same(pixels(data), expected)
        (data,) = against.result().raise_for_status().json()["data"]
        expected = drawn(pipe, "dog", negative_prompt="cat", seed=9, guidance_scale=4.0)
        assert_same(pixels(data), expected)

        body = {"prompt": "cat", "seed": 4, "stream": True, "partial_images": 3}
        lines = ask(url, **body).text.split("\n")
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        assert [event["rows"] for event in events] == sorted({event["rows"] for event in events})
        assert_same(pixels(events[-1]), drawn(pipe, "cat", seed=4))

        assert ask(url, prompt="no such class").status_code == 400
        assert ask(url, prompt="dog", temperature=-1.0).status_code == 400

        before = accepted(url)
        asked = [pool.submit(ask, url, prompt="dog", seed=seed) for seed in range(16)]
        end = time.monotonic() + 60
        while accepted(url) < before + 16:
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert [each.result().status_code for each in asked] == [200] * 16
    assert process.wait(timeout=60) == 0


def test_texts_and_a_dead_engine(serve, tmp_path):
    tiny_text_pipeline().save_pretrained(tmp_path / "texts")
    pipe = Pipeline.from_pretrained(tmp_path / "texts", dtype="float32")
    process, url = serve("--model", str(tmp_path / "texts"))
    answer = ask(url, prompt="a red dog", negative_prompt="ink", seed=2, guidance_scale=3.0)
    (data,) = answer.raise_for_status().json()["data"]
    expected = drawn(pipe, "a red dog", negative_prompt="ink", seed=2, guidance_scale=3.0)
    assert_same(pixels(data), expected)

    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    end = time.monotonic() + 60
    while httpx.get(f"{url}/health").status_code == 200:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert httpx.get(f"{url}/ready").json() == {"status": "failed"}
    answer = ask(url, prompt="a red dog")
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the images could not be drawn"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
