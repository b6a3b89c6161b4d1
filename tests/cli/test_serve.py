"""``llamagen serve`` as a process: it starts, serves, and ends gracefully."""

import concurrent.futures
import os
import re
import signal
import subprocess
import sys
import time

import httpx
import pytest

from tests.tiny_models import tiny_pipeline, tiny_text_pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    # 900 codes of a small model: long enough to be in the middle of it.
    tiny_pipeline(grid=(30, 30)).save_pretrained(folder / "classes")
    tiny_text_pipeline().save_pretrained(folder / "texts")
    return folder


COMMAND = [sys.executable, "-m", "llamagen", "serve", "--port", "0", "--dtype", "float32"]


def start(*arguments, **environment):
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    line = process.stdout.readline()
    match = re.search(r"http://[\d.]+:\d+", line)
    assert match, line + process.stderr.read()
    return process, match[0]


def ask(url, **body):
    return httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)


def test_sigterm_under_load(folders):
    process, url = start("--model", str(folders / "classes"), "--batch-size", "4")
    try:
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            asked = [pool.submit(ask, url, prompt="dog", seed=seed) for seed in range(12)]
            end = time.monotonic() + 30
            while 'in_flight{model="classes"} 12.0' not in httpx.get(f"{url}/metrics").text:
                assert time.monotonic() < end
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            answers = [each.result() for each in asked]
        assert [answer.status_code for answer in answers] == [200] * 12
        with pytest.raises(httpx.ConnectError):
            ask(url, prompt="dog")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
    assert "Traceback" not in process.stderr.read()


def test_several_models_names_and_a_key(folders, tmp_path):
    key = tmp_path / "key"
    key.write_text("geheim\n")
    process, url = start(
        *("--model", f"animals={folders / 'classes'}", f"words={folders / 'texts'}"),
        *("--api-key-file", str(key)),
    )
    try:
        assert httpx.get(f"{url}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer geheim"}
        models = httpx.get(f"{url}/v1/models", headers=headers).json()
        assert [model["id"] for model in models["data"]] == ["animals", "words"]
        assert [model["size"] for model in models["data"]] == ["120x120", "16x16"]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "no-such-model"], "no-such-model"),
        (["--model", "a=x", "a=y"], "two models are called a"),
        (["--model", "emoji", "--max-queue", "0"], "--max-queue is 0"),
        (["--model", "emoji", "--api-key-file", "missing.txt"], "missing.txt"),
        (["--model", "emoji", "--data-parallel-size", "2"], "--data-parallel-size goes with"),
        (["--model", "emoji", "--gpu-memory-utilization", "1.0"], "--gpu-memory-utilization goes"),
    ],
)
@pytest.mark.usefixtures("nothing_downloaded")
def test_bad_input(fails, arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in fails("serve", *arguments)
