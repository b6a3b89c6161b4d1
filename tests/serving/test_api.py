"""The HTTP API with real clients: OpenAI's own, and plain HTTP for what that would never send."""

import asyncio
import base64
import concurrent.futures
import io
import json
import re
import socket
import threading
import time

import httpx
import openai
import pytest
import torch
from PIL import Image

from llamagen.serving.settings import ServerSettings
from llamagen.support.pictures import METADATA_KEY
from tests.serving.servers import running, slow_down
from tests.tiny_models import tiny_pipeline


def post(server, body, **headers):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(
        f"{server.url}/v1/images/generations",
        content=content,
        headers={"Content-Type": "application/json", **headers},
        timeout=60,
    )


def opened(encoded: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    image.load()
    return image


def metrics(server) -> str:
    return httpx.get(f"{server.url}/metrics").text


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_openai_client(client, pipelines):
    answer = client.images.generate(
        model="classes",
        prompt="red fox",
        n=3,
        size="auto",
        extra_body={"seed": 5, "guidance_scale": 2.5, "top_k": 30},
    )
    wanted = pipelines["classes"](
        "red fox", num_images_per_prompt=3, seed=5, guidance_scale=2.5, top_k=30
    )
    assert answer.size == "16x16"
    assert answer.output_format == "png"
    assert answer.usage.output_tokens == 48
    assert answer.usage.input_tokens == 1
    for data, image, metadata in zip(answer.data, wanted.images, wanted.metadata, strict=True):
        got = opened(data.b64_json)
        assert got.tobytes() == image.tobytes()
        assert json.loads(got.text[METADATA_KEY]) == {**metadata, "model": "classes"}


def test_texts_with_a_negative_prompt(client, pipelines):
    answer = client.images.generate(
        model="texts",
        prompt="a llama",
        extra_body={"seed": 1, "negative_prompt": "a very long neck"},
    )
    wanted = pipelines["texts"]("a llama", negative_prompt="a very long neck", seed=1)
    assert opened(answer.data[0].b64_json).tobytes() == wanted.images[0].tobytes()


@pytest.mark.parametrize(("kind", "name"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats_and_urls(server, client, kind, name):
    answer = client.images.generate(
        prompt="dog", output_format=kind, response_format="url", extra_body={"seed": 0}
    )
    url = answer.data[0].url
    assert url.endswith(f".{kind}")
    file = httpx.get(url)
    assert file.headers["content-type"] == f"image/{kind}"
    assert Image.open(io.BytesIO(file.content)).format == name
    missing = httpx.get(f"{server.url}/v1/files/nobody-can-guess.png")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "not_found"


def test_stream(client, pipelines):
    events = list(
        client.images.generate(
            model="classes", prompt="cat", stream=True, partial_images=3, extra_body={"seed": 9}
        )
    )
    assert [event.type for event in events] == [
        *["image_generation.partial_image"] * 3,
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events[:-1]] == [0, 1, 2]
    wanted = pipelines["classes"]("cat", seed=9).images[0]
    assert opened(events[-1].b64_json).tobytes() == wanted.tobytes()
    assert events[-1].usage.output_tokens == 16
    first = opened(events[0].b64_json)
    assert first.size == wanted.size
    # A quarter is drawn, the rest is grey.
    assert first.getcolors(1000) != wanted.getcolors(1000)
    assert first.crop((0, 4, 16, 16)).getcolors() == [(192, (128, 128, 128))]
    assert len(first.crop((0, 0, 16, 4)).getcolors()) > 1


def test_stream_of_several_images(server):
    with httpx.stream(
        "POST",
        f"{server.url}/v1/images/generations",
        json={"prompt": "crane", "n": 3, "stream": True, "partial_images": 64, "seed": 3},
    ) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    done = [event for event in events if event["type"] == "image_generation.completed"]
    assert sorted((event["index"], event["seed"]) for event in done) == [(0, 3), (1, 4), (2, 5)]
    for index in range(3):
        rows = [event["rows"] for event in events if event["index"] == index]
        assert rows == [1, 2, 3, 4]


def test_models(client, server):
    names = [model.id for model in client.models.list()]
    assert names == ["classes", "texts"]
    card = httpx.get(f"{server.url}/v1/models/classes").json()
    assert card["kind"] == "class"
    assert card["classes"][2] == "red fox"
    assert card["size"] == "16x16"
    assert card["settings"]["guidance_scale"] == 4.0
    assert card["max_images"] == 10
    missing = httpx.get(f"{server.url}/v1/models/..%2f..%2fetc")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_probes_and_metrics(server, client):
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/ready").json() == {"status": "ok"}
    client.images.generate(model="classes", prompt="dog")
    text = metrics(server)
    assert 'llamagen_requests_total{model="classes",status="200"}' in text
    assert 'llamagen_images_in_flight{model="classes"} 0.0' in text
    assert 'llamagen_images_waiting{model="classes"} 0.0' in text
    for histogram in ("llamagen_first_row_seconds", "llamagen_request_seconds"):
        assert float(re.search(rf'{histogram}_count{{model="classes"}} (.*)', text)[1]) > 0
    schema = httpx.get(f"{server.url}/openapi.json").json()
    assert "422" not in schema["paths"]["/v1/images/generations"]["post"]["responses"]


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"prompt": "wombat"}, 400, "there is no class 'wombat'"),
        ({"prompt": ""}, 400, "prompt"),
        ({}, 400, "prompt: Field required"),
        ({"prompt": 7}, 400, "prompt"),
        ({"prompt": "dog", "n": 0}, 400, "n: "),
        ({"prompt": "dog", "n": 11}, 400, "n is 11, but a request may ask for 10"),
        ({"prompt": "dog", "n": 10**30}, 400, "n: "),
        ({"prompt": "dog", "n": "2"}, 400, "n: "),
        ({"prompt": "dog", "model": "../../etc/passwd"}, 404, "there is no model"),
        ({"prompt": "dog", "model": "c2i-L-384"}, 404, "there is no model"),
        ({"prompt": "dog", "top_p": 0}, 400, "top_p"),
        ({"prompt": "dog", "guidance_scale": -1}, 400, "guidance_scale"),
        ({"prompt": "dog", "seed": -2}, 400, "seed: "),
        ({"prompt": "dog", "seed": 2**64}, 400, "seed: "),
        ({"prompt": "dog", "background": "transparent"}, 400, "background"),
        ({"prompt": "dog " * 2000}, 400, "more than 4000 characters"),
        ({"model": "texts", "prompt": "\u0000\u0007"}, 400, ""),
        (b'{"prompt": "dog", "guidance_scale": NaN}', 400, "guidance_scale"),
        (b'{"prompt": "dog"', 400, "JSON"),
        (b'{"prompt": "\xff\xfe"}', 400, ""),
        (b"[]", 400, ""),
        (b"\x00" * 100, 400, ""),
        (b'{"prompt": "' + b"x" * 2**20 + b'"}', 413, "more than 65536 bytes"),
    ],
)
def test_bad_requests(server, body, status, says):
    answer = post(server, body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert says in error["message"]
    assert "\n" not in error["message"]
    assert "Traceback" not in answer.text
    assert "site-packages" not in answer.text


USUAL = [
    {"quality": "auto", "background": "auto", "moderation": "auto", "output_format": "png"},
    {"seed": None, "n": None, "size": None, "quality": "standard", "user": "u"},
]
BESIDE = [
    ({"size": "512x512"}, ["size is '512x512', but classes draws 16x16"]),
    ({"quality": "hd", "style": "vivid"}, ["quality is 'hd', of which", "style is 'vivid', of"]),
    ({"seed": 2**64 - 1}, ["seed is 18446744073709551615, above 9223372036854759807; "]),
    (
        {"steps": 20, "cfg_scale": 7, "sampler_name": "Euler a"},
        [
            "cfg_scale is no parameter of this API",
            "sampler_name is no parameter of this API",
            "steps is for models of random order",
        ],
    ),
]
"""What common clients send, and what the answer says of it."""


def test_clients_that_ask_for_more(server, pipelines):
    plain = post(server, {"prompt": "dog", "seed": 3}).json()
    for body in USUAL:
        answer = post(server, {"prompt": "dog", "seed": 3, **body}).json()
        assert "warnings" not in answer
        assert body.get("seed", 3) is None or answer["data"] == plain["data"]
    for body, said in BESIDE:
        answer = post(server, {"prompt": "dog", "seed": 3, **body})
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert len(found["warnings"]) == len(said)
        lines = zip(found["warnings"], said, strict=True)
        assert all(line.startswith(start) for line, start in lines)
        seed = found["data"][0]["seed"]
        wanted = pipelines["classes"]("dog", seed=seed).images[0]
        assert opened(found["data"][0]["b64_json"]).tobytes() == wanted.tobytes()
    drawn = [post(server, {"prompt": "dog", "seed": -1}).json() for _ in range(2)]
    assert drawn[0]["data"][0]["seed"] != drawn[1]["data"][0]["seed"]
    stream = post(server, {"prompt": "dog", "stream": True, "colour": "red"}).text
    assert "colour is no parameter of this API" in stream


def test_strict_servers_refuse_them(pipelines):
    with running({"classes": pipelines["classes"]}, settings=ServerSettings(strict=True)) as server:
        for body in USUAL:
            assert post(server, {"prompt": "dog", **body}).status_code == 200
        for body, said in (*BESIDE, ({"seed": -1}, ["seed is -1; leave it out"])):
            answer = post(server, {"prompt": "dog", **body})
            assert answer.status_code == 400
            assert any(answer.json()["error"]["message"].startswith(start) for start in said)


def test_a_long_body_of_unsaid_length_is_cut_off(server):
    def parts():
        for _ in range(64):
            yield b" " * 65536

    try:
        answer = httpx.post(f"{server.url}/v1/images/generations", content=parts())
    except httpx.HTTPError:
        # The server may hang up before all is sent.
        pass
    else:
        assert answer.status_code == 413
    assert post(server, {"prompt": "dog"}).status_code == 200


def test_key(pipelines):
    settings = ServerSettings(api_key="geheim")
    with running({"classes": pipelines["classes"]}, settings=settings) as server:
        assert post(server, {"prompt": "dog"}).status_code == 401
        wrong = post(server, {"prompt": "dog"}, Authorization="Bearer geheimnis")
        assert wrong.status_code == 401
        assert wrong.json()["error"]["code"] == "invalid_api_key"
        assert post(server, {"prompt": "dog"}, Authorization="Basic geheim").status_code == 401
        assert post(server, {"prompt": "dog"}, Authorization="Bearer geheim").status_code == 200
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert httpx.get(f"{server.url}/v1/files/x").status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="geheim") as client:
            assert client.models.list().data[0].id == "classes"


def test_a_client_that_leaves_frees_its_place(pipelines):
    with running({"classes": pipelines["classes"]}) as server:
        model = server.models["classes"]
        slow_down(model, 0.05)
        for body in (
            {"prompt": "dog", "n": 4},
            {"prompt": "dog", "n": 4, "stream": True, "partial_images": 3},
        ):
            address = server.url.removeprefix("http://").split(":")
            with socket.create_connection((address[0], int(address[1]))) as connection:
                content = json.dumps(body).encode()
                connection.sendall(
                    b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\n"
                    b"Content-Type: application/json\r\n"
                    + f"Content-Length: {len(content)}\r\n\r\n".encode()
                    + content
                )
                until(lambda: model.engine._running)
            until(lambda: not model.engine._running)
            until(lambda: model._in_flight == 0)
        # Whoever stays gets the image of its seed.
        answer = post(server, {"prompt": "dog", "seed": 4}).json()
        wanted = pipelines["classes"]("dog", seed=4).images[0]
        assert opened(answer["data"][0]["b64_json"]).tobytes() == wanted.tobytes()


def test_five_hundred_at_once(pipelines):
    settings = ServerSettings(max_queue=64)
    with running({"classes": pipelines["classes"]}, settings=settings) as server:
        slow_down(server.models["classes"], 0.01)
        barrier = threading.Barrier(50)

        def ask(seed):
            if seed < 50:
                barrier.wait()
            answer = post(server, {"prompt": "dog", "seed": seed})
            return answer.status_code, answer

        with concurrent.futures.ThreadPoolExecutor(250) as pool:
            results = list(pool.map(ask, range(500)))
        codes = [status for status, _ in results]
        assert set(codes) == {200, 429}
        assert codes.count(200) >= 72
        assert codes.count(429) >= 1
        for status, answer in results:
            if status == 429:
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["code"] == "queue_full"
        assert server.models["classes"]._in_flight == 0
        for seed in [seed for seed, (status, _) in enumerate(results) if status == 200][:5]:
            wanted = pipelines["classes"]("dog", seed=seed).images[0]
            image = opened(results[seed][1].json()["data"][0]["b64_json"])
            assert image.tobytes() == wanted.tobytes()


def test_a_fault_is_a_500_and_the_next_request_works(pipelines):
    with running({"classes": pipelines["classes"]}) as server:
        batch = server.models["classes"].engine._batch
        step, faults = batch.step, iter([True, False, True])

        def faulty():
            if next(faults, False):
                raise RuntimeError("/secret/path")
            step()

        batch.step = faulty
        answer = post(server, {"prompt": "dog"})
        assert answer.status_code == 500
        assert "secret" not in answer.text
        assert answer.json()["error"]["type"] == "server_error"
        # In a stream it is an event.
        stream = post(server, {"prompt": "dog", "stream": True, "partial_images": 2})
        assert stream.status_code == 200
        assert "event: error" in stream.text
        assert "secret" not in stream.text
        assert post(server, {"prompt": "dog"}).status_code == 200
        assert server.models["classes"]._in_flight == 0


def test_a_fault_of_the_decoder(pipelines):
    with running({"classes": pipelines["classes"]}) as server:
        decoder = server.models["classes"].decoder
        decode, decoder._decode = decoder._decode, None
        assert post(server, {"prompt": "dog"}).status_code == 500
        decoder._decode = decode
        assert post(server, {"prompt": "dog"}).status_code == 200


def test_weights_that_are_not_finite_are_no_fault_of_the_client():
    pipe = tiny_pipeline()
    with torch.no_grad():
        pipe.transformer.cls_embedding.embedding_table.weight[0] = torch.nan
    with running({"classes": pipe}) as server:
        answer = post(server, {"prompt": "0"})
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "the images could not be drawn"
        assert post(server, {"prompt": "1"}).status_code == 200


def test_an_engine_that_has_ended(pipelines):
    with running({"classes": pipelines["classes"]}) as server:
        asyncio.run(server.models["classes"].engine.close())
        for probe in ("health", "ready"):
            answer = httpx.get(f"{server.url}/{probe}")
            assert (answer.status_code, answer.json()) == (503, {"status": "failed"})
        assert post(server, {"prompt": "dog"}).status_code == 500


def test_a_request_that_takes_too_long(pipelines):
    with running({"classes": pipelines["classes"]}, settings=ServerSettings(timeout=0.3)) as server:
        model = server.models["classes"]
        slow_down(model, 0.1)
        answer = post(server, {"prompt": "dog"})
        assert answer.status_code == 504
        stream = post(server, {"prompt": "dog", "stream": True})
        assert "took too long" in stream.text
        until(lambda: model._in_flight == 0 and not model.engine._running)


def test_draining(pipelines):
    with running({"classes": pipelines["classes"]}) as server:
        slow_down(server.models["classes"], 0.05)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            running_one = pool.submit(post, server, {"prompt": "dog"})
            until(lambda: server.models["classes"].engine._running)
            server.app.state.gate.draining = True
            refused = post(server, {"prompt": "dog"})
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            assert httpx.get(f"{server.url}/ready").status_code == 503
            assert httpx.get(f"{server.url}/health").status_code == 200
            assert running_one.result().status_code == 200
