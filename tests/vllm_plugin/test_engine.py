"""vLLM in processes of its own: the engine for servers, for pipelines, and its HTTP server."""

import asyncio
import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch

from llamagen.cli.main import main
from llamagen.config import SamplingConfig
from llamagen.generation import GenerationRequest, NativeEngine
from llamagen.generation.request import UNKNOWN
from llamagen.support.errors import InputError
from llamagen.vllm_plugin.export import ExportOptions, export_for_vllm
from llamagen.vllm_plugin.prompts import Prompts
from tests.tiny_models import tiny_pipeline, tiny_text_pipeline, tiny_transformer
from tests.vllm_plugin.conftest import SECOND_RUNNER
from tests.vllm_plugin.engines import Image, alone, mixed_settings, request_of

pytest.importorskip("vllm")
pytestmark = pytest.mark.skipif(
    SECOND_RUNNER, reason="Triton's interpreter is set up in this process only"
)

SMALL = {"enforce_eager": True, "max_num_seqs": 16, "kv_cache_memory_bytes": 2**25}
SAMPLING = SamplingConfig(guidance_scale=3.0, top_k=20)


def count(codes):
    return len(codes) - codes.count(UNKNOWN)


async def all_of(stream):
    return [codes async for codes in stream]


def test_an_engine_for_servers():
    """Images at once, one given up on the way, and what is refused."""
    from llamagen.vllm_plugin.engine import VllmEngine

    model = tiny_transformer()
    export = ExportOptions(negative_prompts=True)
    engine = VllmEngine(model, export=export, dtype="float32", **SMALL)
    images = [
        Image(condition=torch.tensor(i % 5), seed=i, sampling=settings)
        for i, settings in enumerate(mixed_settings(30, codes=16))
    ]
    images.append(
        Image(condition=torch.tensor(1), seed=5, sampling=SAMPLING, unconditional=torch.tensor(2))
    )

    def draw(image):
        return engine.stream(request_of(image))

    async def give_up():
        stream = draw(images[2])
        codes = await anext(stream)
        await stream.aclose()
        return codes

    async def use():
        drawn = await asyncio.gather(give_up(), *(all_of(draw(image)) for image in images))
        first = count(drawn[0])
        assert drawn[0] == alone(model, images[2])[:first] + [UNKNOWN] * (16 - first)
        assert first < 16
        for image, steps in zip(images, drawn[1:], strict=True):
            assert steps[-1] == alone(model, image)
            counts = [count(codes) for codes in steps]
            assert counts == sorted(set(counts))
            assert all(number % 4 == 0 for number in counts)
            assert {len(codes) for codes in steps} == {16}
        for bad, message in [
            (Image(condition=torch.tensor(9)), "classes 0 to 4"),
            (Image(condition=torch.tensor(0), seed=-1), "seed is -1"),
            (Image(condition=torch.zeros(3, 16)), "one label"),
        ]:
            with pytest.raises(InputError, match=message):
                await all_of(draw(bad))
        # Nothing of that has harmed it.
        assert (await all_of(draw(images[0])))[-1] == alone(model, images[0])
        await engine.close()

    assert engine.grid == (4, 4)
    assert engine.max_images == 16
    asyncio.run(use())


def test_a_pipeline_on_vllm(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    ours = pipe(["cat", "crane"], num_images_per_prompt=3, seed=4, guidance_scale=3.0, top_k=20)
    from llamagen.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(
        tmp_path, dtype="float32", engine="vllm", engine_options=dict(SMALL)
    )
    seen = []
    theirs = pipe(
        ["cat", "crane"],
        num_images_per_prompt=3,
        seed=4,
        guidance_scale=3.0,
        top_k=20,
        callback=lambda progress: seen.append((progress.row, progress.codes.clone())),
    )
    assert torch.equal(theirs.codes, ours.codes)
    assert [row for row, _ in seen] == [1, 2, 3, 4]
    for row, codes in seen:
        assert torch.equal(codes[:, :row], ours.codes[:, :row])
        assert not codes[:, row:].any()

    def stop(progress):
        raise KeyError(progress.row)

    with pytest.raises(KeyError):
        pipe("cat", callback=stop)
    with pytest.raises(InputError, match="negative_prompts"):
        pipe("cat", negative_prompt="dog")
    again = pipe(["cat", "crane"], num_images_per_prompt=3, seed=4, guidance_scale=3.0, top_k=20)
    assert torch.equal(again.codes, ours.codes)
    pipe.close()


def test_generate_on_vllm(tmp_path, capfd):
    """Prompts of several lengths and a longer negative one, from the command line."""
    pipe = tiny_text_pipeline()
    pipe.save_pretrained(tmp_path / "pipe")
    arguments = [
        *("generate", "--model", str(tmp_path / "pipe"), "--dtype", "float32", "--seed", "3"),
        *("--prompt", "a boat", "two large boats", "--negative-prompt", "nothing of that kind"),
    ]
    for engine in ("native", "vllm"):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--out", str(tmp_path / engine), "--engine", engine])
        assert ended.value.code == 0
    out = capfd.readouterr().out
    assert sorted(out.split()) == sorted(
        str(tmp_path / engine / name)
        for engine in ("native", "vllm")
        for name in ("a-boat-3.png", "two-large-boats-4.png", "sheet.png")
    )
    native, vllm = ((tmp_path / each / "sheet.png").read_bytes() for each in ("native", "vllm"))
    assert native == vllm


def test_sizes_go_with_vllm(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--model", "emoji", "--prompt", "x", "--tensor-parallel-size", "2"])
    assert ended.value.code == 2
    assert "--engine vllm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 3}, "divisor of the model's 4 heads"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is not supported"),
        ({"speculative_config": {"method": "ngram"}}, "speculative decoding"),
        ({"no_such_option": 1}, "vLLM refuses to start with these options.*no_such_option"),
    ],
)
def test_rejects_invalid_options(options, message):
    from llamagen.vllm_plugin.engine import VllmEngine

    with pytest.raises(InputError, match=message):
        VllmEngine(tiny_transformer(), **options)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tensor_parallel_size", "data_parallel_size"])
def test_two_processes(monkeypatch, size):
    from llamagen.vllm_plugin.engine import VllmEngine

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    model = tiny_transformer()
    engine = VllmEngine(model, dtype="float32", **{**SMALL, size: 2})
    requests = [
        GenerationRequest(condition=torch.tensor(seed % 5), seed=seed, sampling=SAMPLING)
        for seed in range(20)
    ]
    codes = engine.generate(requests)
    engine.shutdown()
    same = (codes == NativeEngine(model).generate(requests)).flatten(1).all(1)
    # Two processes add the halves of a product, in another order than one: a tie may be decided
    # otherwise, and on some processors one is.
    assert int(same.sum()) >= (19 if size == "tensor_parallel_size" else 20)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["class", "text"])
def test_compiled(start, kind):
    model = tiny_transformer(condition=kind)
    condition = torch.tensor(1) if kind == "class" else torch.randn(3, 16)
    images = [Image(condition=condition, seed=seed, sampling=SAMPLING) for seed in range(9)]
    engine = start(model, enforce_eager=False)
    assert engine.draw(images) == [alone(model, image) for image in images]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["class", "text"])
def test_vllms_own_server(tmp_path, kind):
    """It knows nothing of this package but its entry points."""
    model = tiny_transformer(condition=kind)
    folder = export_for_vllm(model, tmp_path / "model")
    prompts = Prompts(folder, torch.float32)
    condition = torch.tensor(3) if kind == "class" else torch.randn(4, 16)
    prompt = prompts.of(condition)
    body = {"model": "m", "return_token_ids": True, "seed": 8}
    if kind == "class":
        body["prompt"] = prompt["prompt_token_ids"]
    else:
        file = io.BytesIO()
        torch.save(prompt["prompt_embeds"], file)
        body["prompt_embeds"] = base64.b64encode(file.getvalue()).decode()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
        *("--served-model-name", "m", "--skip-tokenizer-init", "--dtype", "float32"),
        *("--enforce-eager", "--kv-cache-memory-bytes", str(2**25), "--port", str(port)),
        *(["--enable-prompt-embeds"] if kind == "text" else []),
    ]
    address = f"http://127.0.0.1:{port}"
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ})
    try:
        _wait_for(f"{address}/health", server, tmp_path / "log")
        body["vllm_xargs"] = {"guidance_scale": 3.0, "top_k": 20}
        (choice,) = _post(f"{address}/v1/completions", body)["choices"]
        image = Image(condition=condition, seed=8, sampling=SAMPLING)
        first = prompts.config.first_code
        assert [token - first for token in choice["token_ids"]] == alone(model, image)
        body["vllm_xargs"] = {"guidance_scale": 3.0, "top_q": 20}
        with pytest.raises(urllib.error.HTTPError) as refused:
            _post(f"{address}/v1/completions", body)
        assert refused.value.code == 400
        assert "no setting 'top_q'" in refused.value.read().decode()
    finally:
        server.terminate()
        server.wait(60)


def _post(address, body):
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def _wait_for(address, server, log):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])
