"""The server's page, in a real browser with a real server behind it."""

import base64
import importlib.resources
import io
import json

import httpx
import numpy as np
import pytest
from PIL import Image

from llamagen.config import sampling_settings
from llamagen.serving.settings import ServerSettings
from llamagen.support.pictures import read_metadata
from tests.serving.servers import running, slow_down
from tests.tiny_models import tiny_pipeline, tiny_text_pipeline

GRID = (8, 8)
GREY = 128


@pytest.fixture(scope="module")
def server():
    pipelines = {"classes": tiny_pipeline(grid=GRID), "texts": tiny_text_pipeline(clean=False)}
    with running(pipelines, settings=ServerSettings(ui=True)) as server:
        yield server


@pytest.fixture
def slowly(server, monkeypatch):
    """An image takes over a second."""
    for model in server.models.values():
        batch = model.engine._batch
        monkeypatch.setattr(batch, "step", batch.step)
        slow_down(model, 0.02)


def test_files_are_served_with_their_headers(server):
    for path, kind in {"/": "html", "/ui/page.css": "css", "/ui/page.js": "javascript"}.items():
        answer = httpx.get(server.url + path)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == f"text/{kind}; charset=utf-8"
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"].split("; ")
        assert "default-src 'self'" in policy
        assert "img-src 'self' blob: data:" in policy
        assert "frame-ancestors 'none'" in policy
        again = httpx.get(server.url + path, headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert httpx.head(server.url + path).headers["etag"] == answer.headers["etag"]


def test_every_file_is_served(server):
    folder = importlib.resources.files("llamagen") / "assets" / "ui"
    names = {file.name for file in folder.iterdir()} - {"index.html"}
    assert {"page.css", "page.js"} <= names
    for name in names:
        assert httpx.get(f"{server.url}/ui/{name}").content == (folder / name).read_bytes()


def test_without_a_page(server):
    with running({"classes": server.models["classes"].pipeline}) as plain:
        assert httpx.get(plain.url).status_code == 404
        assert httpx.get(f"{plain.url}/ui/page.js").status_code == 404


@pytest.mark.slow
def test_shows_the_models_controls(page):
    assert [option.text for option in page.all("#model option")] == ["classes", "texts"]
    offered = page.run("return [...document.querySelectorAll('#classes option')].map(o => o.value)")
    assert offered == ["cat", "dog", "red fox", "grey fox", "crane"]
    assert "32 \N{MULTIPLICATION SIGN} 32" in page.text("about")
    assert [page.value(name) for name in ("guidance_scale", "top_k", "top_p", "temperature")] == [
        *("4", "0", "1", "1")
    ]
    assert [label.text for label in page.all("#sampling label")] == [
        setting.name.replace("_", " ").capitalize()
        for setting in sampling_settings()
        if not setting.random_order
    ]
    assert page.value("guidance_schedule") == "constant"
    assert "1 is none" in page.text("guidance_scale-hint")
    assert not page.shown("negative")
    page.choose("texts")
    assert "16 \N{MULTIPLICATION SIGN} 16" in page.text("about")
    assert page.shown("negative")
    assert page.shown("text")
    assert not page.shown("class")


@pytest.mark.slow
def test_images_grow_row_by_row(page, slowly):
    page.run("""
        window.states = [];
        new MutationObserver(() => {
          const card = document.querySelector("#latest .card");
          const image = card?.querySelector("img");
          const state = JSON.stringify([card?.dataset.rows, image?.src]);
          if (image?.src && state !== window.states.at(-1)) window.states.push(state);
        }).observe(document.getElementById("latest"), {
          subtree: true, childList: true, attributes: true,
        });
    """)
    page.fill(**{"class": "red fox", "count": 2, "seed": 11})
    page.press("draw")
    page.until(page.busy)
    bar = page.until(lambda: page.run("return document.getElementById('bar').value"))
    assert 0 < bar < 1
    assert page.text("progress-text").startswith("Drawing 2 images")
    page.finish()
    assert page.seeds() == [11, 12]
    assert page.text("status") == "2 images ready."
    states = [json.loads(state) for state in page.run("return window.states")]
    unfinished = {int(rows): src for rows, src in states if src.startswith("data:image/png")}
    assert len(unfinished) >= 3
    assert list(unfinished) == sorted(unfinished)
    for rows, src in unfinished.items():
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(src.split(",")[1]))))
        drawn = (pixels != GREY).any(axis=(1, 2))
        assert drawn[: rows * 4].all()
        assert not drawn[rows * 4 :].any()
    assert states[-1][0] == "8"
    assert states[-1][1].startswith("blob:")
    # Whole and sharp.
    style = page.run(
        "const image = document.querySelector('#latest img');"
        "const {clipPath, imageRendering} = getComputedStyle(image);"
        "return [clipPath, imageRendering, image.clientWidth % image.naturalWidth]"
    )
    assert style == ["inset(0px)", "pixelated", 0]


@pytest.mark.slow
def test_a_downloaded_file_says_how_it_was_made(page, server):
    page.draw(**{"class": "Red-Fox", "count": 1, "seed": 3, "top_k": 40, "temperature": 0.9})
    path = page.download()
    assert path.name == "red-fox-3.png"
    told = read_metadata(path)
    assert (told["model"], told["class"], told["seed"]) == ("classes", "red fox", 3)
    assert (told["top_k"], told["temperature"], told["guidance_scale"]) == (40, 0.9, 4.0)
    wanted = server.models["classes"].pipeline("red fox", seed=3, top_k=40, temperature=0.9)
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(wanted.images[0]))


@pytest.mark.slow
def test_prompts_and_negative_prompts(page):
    page.choose("texts")
    page.fill(text="a small house", negative="snow", count=1, guidance_scale=2.5)
    page.one("negative").send_keys("\ue007")
    page.until(page.cards)
    told = read_metadata(page.download())
    assert (told["prompt"], told["negative_prompt"]) == ("a small house", "snow")
    assert told["guidance_scale"] == 2.5
    assert told["seed"] == page.seeds()[0]
    page.press("reset")
    assert page.value("guidance_scale") == "4"


@pytest.mark.slow
def test_a_bad_prompt_is_explained(page):
    page.draw(**{"class": "red foxx"})
    assert page.text("error") == (
        "Could not draw: there is no class 'red foxx'; did you mean 'red fox' or 'grey fox'?"
    )
    assert page.one("error").get_attribute("role") == "alert"
    assert page.shown("error")
    assert page.cards() == []
    page.draw(**{"class": "red fox", "count": 1})
    assert page.text("error") == ""
    assert len(page.cards()) == 1
    # The images of before are still there after a request that failed.
    page.draw(**{"class": "foxes"})
    assert page.text("error")
    assert len(page.cards()) == 1


@pytest.mark.slow
def test_too_many_images_are_not_asked_for(page):
    page.fill(**{"class": "cat", "count": 11})
    page.press("draw")
    assert not page.busy()
    assert page.run("return document.activeElement.id") == "count"
    assert page.run("return document.getElementById('count').validity.rangeOverflow")


@pytest.mark.slow
def test_a_wrong_number_is_not_sent(page):
    page.fill(**{"class": "cat", "top_p": 2})
    page.press("#settings summary")
    assert not page.shown("top_p")
    page.press("draw")
    assert page.shown("top_p")
    assert page.run("return document.activeElement.id") == "top_p"
    page.fill(**{"class": "  ", "top_p": 1})
    page.press("draw")
    assert not page.busy()
    assert page.run("return document.activeElement.id") == "class"


@pytest.mark.slow
def test_history_survives_a_reload(page):
    page.draw(**{"class": "dog", "count": 2, "seed": 5, "top_k": 9})
    page.draw(**{"class": "cat", "count": 1, "seed": 8, "top_k": 7})
    before = page.download().read_bytes()
    assert [image.get_attribute("alt") for image in page.all("#earlier img")] == [
        *("dog, seed 5", "dog, seed 6")
    ]
    page.open()
    page.until(page.cards)
    assert page.seeds() == [8]
    assert page.download().read_bytes() == before
    page.view("#earlier .picture")
    assert page.text("viewer-title") == "dog"
    facts = page.text("viewer-settings")
    assert "Seed5" in facts
    assert "Top k9" in facts
    assert read_metadata(page.download("viewer-download"))["seed"] == 5

    page.press("viewer-remove")
    assert [image.get_attribute("alt") for image in page.all("#earlier img")] == ["dog, seed 6"]
    page.press("clear")
    page.driver.switch_to.alert.accept()
    page.until(lambda: page.shown("empty"))
    page.open()
    assert page.shown("empty")
    assert page.all("#results img") == []


@pytest.mark.slow
def test_same_again_uses_another_seed(page):
    page.draw(**{"class": "crane", "count": 1, "seed": 21, "top_k": 33})
    page.press("reset")
    page.fill(**{"class": "dog"})
    page.press("#latest .card.done button.quiet")
    page.until(lambda: page.all("#earlier img"))
    page.finish()
    told = read_metadata(page.download())
    assert (told["class"], told["top_k"]) == ("crane", 33)
    assert told["seed"] != 21
    assert (page.value("class"), page.value("seed")) == ("crane", "")


@pytest.mark.slow
def test_these_settings_make_the_same_image(page):
    page.draw(**{"class": "crane", "count": 2, "temperature": 1.2})
    seed = page.seeds()[1]
    page.view("#latest .card:nth-child(2) .picture")
    first = page.download("viewer-download").read_bytes()
    page.press("viewer-close")
    page.choose("texts")
    page.view("#latest .card:nth-child(2) .picture")
    page.press("viewer-use")
    assert (page.value("model"), page.value("seed")) == ("classes", str(seed))
    page.press("draw")
    page.until(lambda: page.all("#earlier img"))
    page.finish()
    assert page.seeds() == [seed]
    assert page.download().read_bytes() == first


@pytest.mark.slow
def test_everything_can_be_done_with_the_keyboard(page):
    from selenium.webdriver import ActionChains, Keys

    def press(*keys):
        ActionChains(page.driver).send_keys(*keys).perform()

    def to(name):
        """Goes on with Tab until an element is reached; returns what was passed."""
        passed = []
        while not passed or passed[-1] != name:
            press(Keys.TAB)
            focused, outline = page.run(
                "const e = document.activeElement;"
                "return [e.id || e.className || e.tagName, getComputedStyle(e).outlineStyle]"
            )
            passed.append(focused)
            assert outline != "none", focused
            assert len(passed) < 40, passed
        return passed

    to("class")
    press("red fox")
    to("count")
    press(Keys.BACKSPACE, "1")
    passed = to("draw")
    assert {"seed", "guidance_scale", "temperature", "top_k", "top_p", "reset"} <= set(passed)
    press(Keys.ENTER)
    page.until(page.cards)
    page.finish()
    assert page.run("return document.activeElement.id") == "draw"
    to("picture")
    press(Keys.ENTER)
    page.until(lambda: page.shown("viewer-title"))
    to("viewer-again")
    press(Keys.ENTER)
    page.until(lambda: page.all("#earlier img"))
    page.finish()
    page.view()
    press(Keys.ESCAPE)
    assert not page.shown("viewer-title")
    assert page.run("return document.activeElement.className") == "picture"


@pytest.mark.slow
def test_every_field_has_a_name(page):
    page.draw(**{"class": "cat", "count": 1})
    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {"textbox", "spinbutton", "combobox", "button", "link", "image", "progressbar"}
    found = [
        (node["role"]["value"], node["name"]["value"])
        for node in tree
        if not node["ignored"] and node["role"]["value"] in roles
    ]
    assert [each for each in found if not each[1]] == []
    names = [name for _, name in found]
    assert {"Model", "What to draw", "Images", "Seed", "Guidance scale", "Top k", "Draw"} <= set(
        names
    )


@pytest.mark.slow
def test_stopping_ends_the_drawing(page, server, slowly):
    page.fill(**{"class": "cat", "count": 8})
    page.press("draw")
    page.until(lambda: page.all("#latest [data-rows]"))
    assert in_flight(server) == 8
    page.press("stop")
    page.finish()
    page.until(lambda: in_flight(server) == 0, seconds=5)
    page.until(lambda: not server.models["classes"].engine._running, seconds=5)
    assert page.text("status") == "Stopped. 0 images ready."
    assert page.text("error") == ""
    assert page.all("#latest .card") == []
    assert page.shown("empty")
    # It goes on as if nothing had been.
    page.draw(count=1)
    assert len(page.cards()) == 1


def in_flight(server):
    text = httpx.get(f"{server.url}/metrics").text
    return sum(
        float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith("llamagen_images_in_flight{")
    )


@pytest.mark.slow
def test_pressing_twice_generates_once(page, slowly):
    page.fill(**{"class": "cat", "count": 1})
    page.press("draw")
    page.until(page.busy)
    page.press("draw")
    page.one("class").send_keys("\ue007")
    page.finish()
    assert len(page.cards()) == 1
    assert page.all("#earlier img") == []


@pytest.mark.slow
@pytest.mark.parametrize("model", ["classes", "texts"])
def test_a_phone_needs_no_sideways_scrolling(page, slowly, model):
    page.narrow()
    page.open()
    assert page.run("return innerWidth") == 360
    page.choose(model)
    name = "class" if model == "classes" else "text"
    page.press("#settings summary")
    assert page.overflow() <= 0
    page.draw(**{name: "house" * 900, "count": 2})
    assert "shorten it" in page.text("error")
    assert page.overflow() <= 0
    page.fill(**{name: "cat" if name == "class" else "house" * 100, "count": 3})
    page.press("draw")
    page.until(lambda: page.all("#latest [data-rows]"))
    assert page.overflow() <= 0
    page.finish()
    page.draw(count=1)
    assert page.all("#earlier img")
    assert page.overflow() <= 0
    page.view()
    assert page.overflow() <= 0
    assert page.run("const v = document.getElementById('viewer'); return v.scrollWidth") <= 360


@pytest.mark.slow
def test_prompts_are_text_whatever_they_say(page):
    nasty = "<img src=x onerror=\"alert('x')\"></option><script>alert(1)</script>"
    page.choose("texts")
    page.draw(text=nasty, count=1)
    assert page.text("#latest .prompt") == nasty
    page.view()
    assert page.text("viewer-title") == nasty
    assert len(page.all("script")) == 1


@pytest.mark.slow
def test_a_server_with_a_key(server, visit):
    settings = ServerSettings(ui=True, api_key="open sesame")
    with running({"classes": server.models["classes"].pipeline}, settings=settings) as guarded:
        page = visit(guarded.url)
        assert page.shown("key-form")
        assert not page.shown("form")
        assert page.text("error") == ""
        page.fill(key="wrong")
        page.one("key").send_keys("\ue007")
        page.until(lambda: page.text("error") == "The server does not take this key.")
        assert not page.shown("form")
        page.fill(key="open sesame")
        page.one("key").send_keys("\ue007")
        page.until(lambda: page.shown("form"))
        assert not page.shown("key-form")
        assert not page.shown("model")
        page.draw(**{"class": "cat", "count": 1})
        assert len(page.cards()) == 1
        # As long as the tab is open.
        page.open()
        assert page.shown("form")
        page.run("sessionStorage.clear()")
        page.open()
        assert page.shown("key-form")


@pytest.mark.slow
def test_a_server_that_is_gone(server, visit):
    pipelines = {"classes": server.models["classes"].pipeline}
    with running(pipelines, settings=ServerSettings(ui=True)) as gone:
        page = visit(gone.url)
    page.draw(**{"class": "cat", "count": 1})
    assert page.text("error") == "Could not draw: the server does not answer."
    page.read_logs()
    assert all("ERR_CONNECTION_REFUSED" in line for line in page.said)
    page.said.clear()
