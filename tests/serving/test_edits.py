"""Edits, blends and the best of several over HTTP: what ``Editor`` and ``Pipeline`` give."""

import base64
import concurrent.futures
import io
import json
import zlib

import httpx
import numpy as np
import pytest
from PIL import Image, ImageDraw

from llamagen.pipeline.editing import Editor
from llamagen.serving.settings import ServerSettings
from llamagen.support.pictures import METADATA_KEY
from tests.serving.servers import running, slow_down

SETTINGS = {"guidance_scale": 2.5, "top_k": 30}


@pytest.fixture(scope="module")
def photo():
    """No square, and larger than what the models draw."""
    generator = np.random.default_rng(0)
    small = Image.fromarray(generator.integers(0, 255, (6, 9, 3), dtype=np.uint8))
    return small.resize((90, 60), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def mask(photo):
    """White in the middle."""
    mask = Image.new("L", photo.size)
    ImageDraw.Draw(mask).rectangle((40, 20, 60, 34), fill=255)
    return mask


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def send(server, path="edits", *, image=None, mask=None, fields=None):
    files = {"image": image, "mask": mask}
    return httpx.post(
        f"{server.url}/v1/images/{path}",
        data={"prompt": "dog", **(fields or {})},
        files={name: ("x.png", content) for name, content in files.items() if content is not None},
        timeout=60,
    )


def opened(encoded: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    image.load()
    return image


def assert_same(data, wanted, *, model="classes"):
    """The images of an answer, their seeds and what they say of themselves."""
    assert len(data) == len(wanted.images)
    for given, image, seed, about in zip(
        data, wanted.images, wanted.seeds, wanted.metadata, strict=True
    ):
        given = given if isinstance(given, dict) else given.model_dump()
        got = opened(given["b64_json"])
        assert json.loads(got.text[METADATA_KEY]) == {**about, "model": model}
        assert given["seed"] == seed
        assert got.tobytes() == image.tobytes()


def test_inpainting_with_openai_client(client, pipelines, photo, mask):
    answer = client.images.edit(
        model="classes",
        image=("photo.png", png(photo)),
        mask=("mask.png", png(mask)),
        prompt="red fox",
        n=2,
        extra_body={"seed": 5, **SETTINGS},
    )
    wanted = Editor(pipelines["classes"]).inpaint(
        photo, mask, "red fox", num_images_per_prompt=2, seed=5, **SETTINGS
    )
    assert_same(answer.data, wanted)
    assert answer.size == "16x16"
    # Four candidates of two images.
    assert answer.usage.output_tokens == 2 * 4 * 16
    # A file with transparency in the same place does the same, and one with none that could have.
    hole = photo.convert("RGBA")
    hole.putalpha(Image.eval(mask, lambda level: 255 - level))
    for other in (hole, mask.convert("RGBA")):
        again = client.images.edit(
            image=[("photo.png", png(photo))],
            mask=("mask.png", png(other)),
            prompt="2",
            n=2,
            extra_body={"seed": 5, **SETTINGS},
        )
        assert [each.b64_json for each in again.data] == [each.b64_json for each in answer.data]


def test_completion(server, pipelines, photo):
    editor = Editor(pipelines["classes"])
    answer = send(server, image=png(photo), fields={"seed": 3, "n": 2, **SETTINGS}).json()
    wanted = editor.complete(photo, "dog", num_images_per_prompt=2, seed=3, **SETTINGS)
    assert_same(answer["data"], wanted)
    fields = {"edit": "complete", "keep_rows": 1, "seed": 3, "best_of": 3, "rank_by": "condition"}
    answer = send(server, image=png(photo), fields=fields).json()
    wanted = editor.complete(photo, "dog", keep_rows=1, seed=3, best_of=3, rank_by="condition")
    assert_same(answer["data"], wanted)


@pytest.mark.parametrize(("best_of", "size"), [(1, "28x20"), (3, "auto")])
def test_outpainting(server, pipelines, photo, best_of, size):
    fields = {"edit": "outpaint", "below": 1, "right": 3, "seed": 7, "n": 2, "size": size}
    fields["best_of"] = best_of
    answer = send(server, image=png(photo), fields=fields).json()
    wanted = Editor(pipelines["classes"]).outpaint(
        photo, "dog", below=1, right=3, seed=7, num_images_per_prompt=2, best_of=best_of
    )
    assert_same(answer["data"], wanted)
    assert answer["size"] == "28x20"


def test_variations(client, server, pipelines, photo):
    editor = Editor(pipelines["classes"])
    wanted = editor.vary(photo, "cat", keep=0.25, seed=2, num_images_per_prompt=2)
    answer = client.images.create_variation(
        image=("photo.png", png(photo)), n=2, extra_body={"prompt": "cat", "keep": 0.25, "seed": 2}
    )
    assert_same(answer.data, wanted)
    fields = {"edit": "vary", "keep": 0.25, "seed": 2, "n": 2, "prompt": "cat"}
    assert_same(send(server, image=png(photo), fields=fields).json()["data"], wanted)
    wanted = editor.vary(photo, "dog", seed=2, num_images_per_prompt=2, best_of=2)
    fields = {"seed": 2, "n": 2, "best_of": 2}
    assert_same(send(server, "variations", image=png(photo), fields=fields).json()["data"], wanted)


def test_an_edit_by_text(server, pipelines, photo):
    fields = {"model": "texts", "prompt": "a red house", "blend": "snow on a hill", "seed": 1}
    fields |= {"blend_share": 0.3, "negative_prompt": "fog"}
    answer = send(server, image=png(photo), fields=fields).json()
    wanted = Editor(pipelines["texts"]).complete(
        photo,
        "a red house",
        blend="snow on a hill",
        blend_share=0.3,
        negative_prompt="fog",
        seed=1,
    )
    assert_same(answer["data"], wanted, model="texts")


def test_blends_and_the_best_of_several(client, pipelines):
    answer = client.images.generate(
        prompt="cat",
        n=2,
        extra_body={"blend": "crane", "blend_share": 0.7, "best_of": 4, "seed": 11, **SETTINGS},
    )
    wanted = pipelines["classes"](
        "cat",
        num_images_per_prompt=2,
        blend="crane",
        blend_share=0.7,
        best_of=4,
        seed=11,
        **SETTINGS,
    )
    assert_same(answer.data, wanted)
    # The winner alone, with its own seed.
    seed = answer.data[1].seed
    alone = client.images.generate(
        prompt="cat", extra_body={"blend": "crane", "blend_share": 0.7, "seed": seed, **SETTINGS}
    )
    assert opened(alone.data[0].b64_json).tobytes() == wanted.images[1].tobytes()


def test_streams(client, server, pipelines, photo, mask):
    events = list(
        client.images.generate(
            prompt="cat",
            n=2,
            stream=True,
            partial_images=3,
            extra_body={"best_of": 3, "seed": 9},
        )
    )
    assert [event.type for event in events] == ["image_generation.completed"] * 2
    wanted = pipelines["classes"]("cat", num_images_per_prompt=2, best_of=3, seed=9)
    events = sorted((event.model_dump() for event in events), key=lambda event: event["index"])
    assert_same(events, wanted)

    edit = {
        "image": ("photo.png", png(photo)),
        "mask": ("mask.png", png(mask)),
        "prompt": "dog",
        "stream": True,
        "partial_images": 2,
    }
    events = list(client.images.edit(**edit, extra_body={"seed": 4, "best_of": 1}))
    assert [event.type for event in events] == [
        *["image_edit.partial_image"] * 2,
        "image_edit.completed",
    ]
    wanted = Editor(pipelines["classes"]).inpaint(photo, mask, "dog", seed=4, best_of=1)
    assert opened(events[-1].b64_json).tobytes() == wanted.images[0].tobytes()
    assert opened(events[0].b64_json).getpixel((0, 15)) == (128, 128, 128)


def test_candidates_count_as_images(pipelines):
    with running(pipelines, max_images=2, settings=ServerSettings(max_queue=6)) as server:
        model = server.models["classes"]

        def ask(**body):
            body = {"prompt": "dog", **body}
            return httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60)

        refused = ask(n=3, best_of=3)
        assert refused.status_code == 400
        assert refused.json()["error"]["message"] == (
            "n is 3 with 3 candidates each, but this server takes 8 images at once"
        )
        slow_down(model, 0.02)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            asked = list(pool.map(lambda _: ask(best_of=5).status_code, range(4)))
        assert set(asked) == {200, 429}
        assert ask(n=2, best_of=4).status_code == 200
        assert model._in_flight == 0
        text = httpx.get(f"{server.url}/metrics").text
        made = float(text.split('llamagen_images_total{model="classes"} ')[1].split("\n")[0])
        assert made == asked.count(200) + 2
        assert 'llamagen_images_waiting{model="classes"} 0.0' in text


def test_ranking_while_others_draw(server, pipelines, photo):
    """Each client gets its own images, whatever else the engine generates."""

    def edited(seed):
        fields = {"edit": "vary", "best_of": 3, "seed": seed}
        return send(server, image=png(photo), fields=fields).json()["data"][0]

    def drawn(seed):
        body = {"prompt": "dog", "seed": seed}
        answer = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60)
        return answer.json()["data"][0]

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        edits, images = pool.map(edited, range(6)), pool.map(drawn, range(6))
        edits, images = list(edits), list(images)
    editor = Editor(pipelines["classes"])
    for seed in range(6):
        assert_same([edits[seed]], editor.vary(photo, "dog", best_of=3, seed=seed))
        assert_same([images[seed]], pipelines["classes"]("dog", seed=seed))


def huge_png() -> bytes:
    """Says that it has 20000 x 20000 pixels."""
    data = bytearray(png(Image.new("L", (1, 1))))
    header = b"IHDR" + (20000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    data[12:33] = header + zlib.crc32(header).to_bytes(4, "big")
    return bytes(data)


BLACK, WHITE = Image.new("L", (90, 60)), Image.new("L", (90, 60), 255)
SPECK = WHITE.copy()
SPECK.paste(0, (46, 0, 47, 1))


@pytest.mark.parametrize(
    ("files", "fields", "says"),
    [
        ({}, {}, "image is missing"),
        ({"image": b"not an image"}, {}, "image is no image of a known format"),
        ({"image": b""}, {}, "image is an empty file"),
        (
            {"image": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"},
            {},
            "no image of a known",
        ),
        ({"image": "cut"}, {}, "image cannot be read as an image"),
        ({"image": huge_png()}, {}, "image cannot be read as an image (Image size"),
        ({"mask": b"\x00\x01"}, {}, "mask is no image of a known format"),
        ({"mask": png(Image.new("L", (30, 30), 255))}, {}, "the mask has 30x30 pixels, but"),
        ({"mask": png(BLACK)}, {}, "the mask marks nothing"),
        ({"mask": png(WHITE)}, {}, "the mask leaves no whole square"),
        ({"mask": png(SPECK)}, {}, "the mask leaves no whole square"),
        ({"mask": png(WHITE)}, {"edit": "vary"}, "mask goes with edit inpaint, and this is vary"),
        ({}, {"edit": "inpaint", "image": "x"}, "image is no file"),
        ({"image": "photo"}, {"edit": "inpaint"}, "mask is missing"),
        ({"image": "photo"}, {"edit": "erase"}, "edit: "),
        ({"image": "photo"}, {"keep": 0.5}, "keep goes with edit vary, and this is complete"),
        ({"image": "photo"}, {"keep_rows": 4}, "keep_rows is 4, expected 1 to 3"),
        ({"image": "photo"}, {"edit": "outpaint"}, "ask for at least one"),
        (
            {"image": "photo"},
            {"edit": "outpaint", "below": 9},
            "below is 9, but this server draws 8",
        ),
        ({"image": "photo"}, {"edit": "vary", "keep": 1.5}, "keep: "),
        ({"image": "photo"}, {"prompt": "wombat"}, "there is no class 'wombat'"),
        ({"image": "photo"}, {"blend": "wombat"}, "there is no class 'wombat'"),
        ({"image": "photo"}, {"blend_share": 0.2}, "blend_share goes with blend"),
        ({"image": "photo"}, {"blend": "cat", "blend_share": "much"}, "blend_share: "),
        ({"image": "photo"}, {"best_of": 17}, "best_of: "),
        ({"image": "photo"}, {"rank_by": "beauty"}, "rank_by: "),
        ({"image": "photo"}, {"prompt": ["cat", "dog"]}, "prompt is given twice"),
        ({"image": "photo"}, {"n": "many"}, "n: "),
    ],
)
def test_bad_requests(server, photo, files, fields, says):
    whole = png(photo)
    content = {"photo": whole, "cut": whole[: len(whole) // 2]}
    if "mask" in files:
        files = {"image": "photo", **files}
    given = {name: content[file] if isinstance(file, str) else file for name, file in files.items()}
    if not given:
        # A form all the same.
        fields = {name: (None, str(value)) for name, value in {"prompt": "dog", **fields}.items()}
        answer = httpx.post(f"{server.url}/v1/images/edits", files=fields)
    else:
        answer = send(server, fields=fields, **given)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert says in message
    assert "\n" not in message
    assert "Traceback" not in answer.text
    assert server.models["classes"]._in_flight == 0


def test_rejects_other_bodies_than_forms(server):
    for content, kind in [
        (b"{}", "application/json"),
        (b"prompt=dog", "application/x-www-form-urlencoded"),
        (b"prompt", "multipart/form-data"),
        (b"\x00" * 99, "multipart/form-data; boundary=x"),
        (b"--x\r\n\r\n", "multipart/form-data; boundary=x"),
    ]:
        for path in ("edits", "variations"):
            answer = httpx.post(
                f"{server.url}/v1/images/{path}", content=content, headers={"Content-Type": kind}
            )
            assert answer.status_code == 400, content
            assert "form" in answer.json()["error"]["message"]


def test_bodies_have_limits(pipelines, photo):
    settings = ServerSettings(max_upload=100_000, max_upload_memory=150_000, max_upload_pixels=5000)
    with running(pipelines, settings=settings) as server:
        answer = send(server, image=bytes(100_001))
        assert answer.status_code == 413
        assert answer.json()["error"]["message"] == "the body has more than 100000 bytes"

        def parts():
            for _ in range(100):
                yield bytes(10_000)

        try:
            answer = httpx.post(f"{server.url}/v1/images/variations", content=parts())
            assert answer.status_code == 413
        except httpx.HTTPError:
            # The server may hang up before all is sent.
            pass
        # The other endpoint takes no more than before.
        body = {"prompt": "x" * 70_000}
        answer = httpx.post(f"{server.url}/v1/images/generations", json=body)
        assert answer.status_code == 413
        large = send(server, image=png(photo))
        assert large.status_code == 400
        assert large.json()["error"]["message"] == (
            "image has 90x60 pixels, but no more than 5000 are taken; make it smaller"
        )
        small = png(photo.resize((45, 30)))
        assert send(server, image=small).status_code == 200
        # Two whose bodies are too much together.
        slow_down(server.models["classes"], 0.05)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            # What comes after the end of an image does not matter.
            padded = small + bytes(90_000)
            found = list(pool.map(lambda _: send(server, image=padded).status_code, range(2)))
        assert sorted(found) == [200, 429]
        assert send(server, image=small).status_code == 200


def test_nothing_reaches_the_file_system(server, photo, monkeypatch):
    def refuse(*_):
        raise AssertionError("a form was written to a file")

    monkeypatch.setattr("tempfile.SpooledTemporaryFile.rollover", refuse)
    padded = png(photo) + bytes(5_000_000)
    assert send(server, image=padded).status_code == 200


def test_rejects_edits_the_engine_does_not_support(pipelines, photo, mask):
    with running({"classes": pipelines["classes"]}) as server:
        server.models["classes"].engine.can_edit = False
        for answer in (
            send(server, image=png(photo)),
            send(server, image=png(photo), mask=png(mask)),
            send(server, "variations", image=png(photo)),
            *(
                httpx.post(f"{server.url}/v1/images/generations", json={"prompt": "dog", **body})
                for body in ({"best_of": 2}, {"blend": "cat"}, {"blend": "cat", "stream": True})
            ),
        ):
            assert answer.status_code == 400
            message = answer.json()["error"]["message"]
            assert "neither edits nor blends nor ranks" in message


def test_a_blend_that_has_no_room(pipelines):
    with running({"classes": pipelines["classes"]}, max_images=1) as server:
        body = {"prompt": "dog", "blend": "cat"}
        for stream in (False, True):
            answer = httpx.post(
                f"{server.url}/v1/images/generations", json={**body, "stream": stream}
            )
            assert answer.status_code == (200 if stream else 400)
            assert "a blend and guidance needs 3 sequences" in answer.text
        answer = httpx.post(
            f"{server.url}/v1/images/generations", json={**body, "guidance_scale": 1}
        )
        assert answer.status_code == 200


def test_a_fault_of_ranking(pipelines, monkeypatch):
    def fail(*_):
        raise RuntimeError

    with running({"classes": pipelines["classes"]}) as server:
        monkeypatch.setattr("llamagen.serving.models.score_images", fail)
        body = {"prompt": "dog", "best_of": 2}
        answer = httpx.post(f"{server.url}/v1/images/generations", json=body)
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "the images could not be drawn"
        monkeypatch.undo()
        answer = httpx.post(f"{server.url}/v1/images/generations", json=body)
        assert answer.status_code == 200
        assert server.models["classes"]._in_flight == 0
