"""Editing on the server's page, in a real browser with a real server behind it."""

import json

import numpy as np
import pytest
from PIL import Image

from llamagen.pipeline.editing import Editor
from llamagen.serving.settings import ServerSettings
from llamagen.support.pictures import read_metadata
from tests.serving.servers import running
from tests.tiny_models import tiny_pipeline, tiny_text_pipeline

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server():
    pipelines = {"classes": tiny_pipeline(grid=(8, 8)), "texts": tiny_text_pipeline(clean=False)}
    with running(pipelines, settings=ServerSettings(ui=True)) as server:
        yield server


@pytest.fixture
def editor(server):
    return Editor(server.models["classes"].pipeline)


@pytest.fixture
def photo(tmp_path):
    """As large as the model's images: nothing is resized."""
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def take(page, path):
    if not page.shown("image"):
        page.press("#edit summary")
    page.one("image").send_keys(str(path))
    page.until(lambda: page.shown("canvas"))


def choose(page, kind):
    page.press(f"#edit-kind option[value='{kind}']")


def slide(page, name, value):
    page.run(
        "const field = document.getElementById(arguments[0]); field.value = arguments[1];"
        "field.dispatchEvent(new Event('input'))",
        name,
        value,
    )


def paint(page, *places):
    """Moves the mouse over the canvas, from place to place in shares of its size."""
    from selenium.webdriver import ActionChains

    canvas = page.one("canvas")
    side = canvas.size["width"]
    moves = [(round((x - 0.5) * side), round((y - 0.5) * side)) for x, y in places]
    chain = ActionChains(page.driver, duration=20)
    chain.move_to_element_with_offset(canvas, *moves[0]).click_and_hold()
    for move in moves[1:]:
        chain.move_to_element_with_offset(canvas, *move)
    chain.release().perform()


def assert_drawn(page, wanted):
    """The first card is what an editor makes."""
    path = page.download()
    told = read_metadata(path)
    assert told == {**wanted.metadata[0], "model": told["model"]}
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(wanted.images[0]))


def test_painted_region_is_regenerated(page, editor, photo, tmp_path):
    take(page, photo)
    page.fill(**{"class": "red fox", "count": 1, "seed": 5})
    page.press("draw")
    assert not page.busy()
    assert page.run("return document.activeElement.id") == "edit-kind"
    paint(page, (0.3, 0.3), (0.6, 0.3))
    page.draw()
    assert page.text("error") == ""
    told = read_metadata(page.download())
    assert told["edit"]["kind"] == "inpaint"
    assert 0 < told["edit"]["drawn_codes"] < 32
    assert (told["class"], told["best_of"]) == ("red fox", 4)
    before, after = (np.asarray(Image.open(path)) for path in (photo, page.download()))
    changed = (before != after).any(-1)
    assert changed[9, 10:18].any()
    assert not changed[20:].any()
    assert not changed[:, 26:].any()
    # A seed of the best one makes it again, from what this browser has kept.
    page.open()
    page.until(page.cards)
    seed = page.seeds()[0]
    page.view()
    assert "EditDraw a part anew" in page.text("viewer-settings")
    page.press("viewer-use")
    page.until(lambda: page.shown("canvas"))
    assert page.value("seed") == str(seed)
    page.press("draw")
    page.until(lambda: page.all("#earlier img"))
    page.finish()
    assert np.array_equal(after, np.asarray(Image.open(page.download())))


def test_erasing_and_clearing(page, photo):
    take(page, photo)
    page.fill(**{"class": "cat", "count": 1})
    for undo in (
        lambda: page.press("clear-mask"),
        lambda: (page.press("erase"), slide(page, "brush", 8), paint(page, (0.5, 0.5))),
    ):
        paint(page, (0.5, 0.5))
        undo()
        page.press("draw")
        assert not page.busy()
        assert page.cards() == []
    page.press("erase")
    paint(page, (0.5, 0.5))
    page.draw()
    assert len(page.cards()) == 1


def test_painting_with_the_keyboard(page, editor, photo, tmp_path):
    from selenium.webdriver import ActionChains, Keys

    take(page, photo)
    slide(page, "brush", 1)
    page.run("document.getElementById('image').focus()")
    chain = ActionChains(page.driver)
    chain.send_keys(Keys.TAB, Keys.ARROW_UP, Keys.ARROW_LEFT, Keys.SPACE).perform()
    assert page.run("return document.activeElement.id") == "canvas"
    page.draw(**{"class": "cat", "count": 1, "seed": 2, "best_of": 1})
    told = read_metadata(page.download())
    assert told["edit"] == {"kind": "inpaint", "drawn_codes": 1}
    changed = (np.asarray(Image.open(page.download())) != np.asarray(Image.open(photo))).any(-1)
    rows, columns = changed.nonzero()
    assert {*(rows // 4), *(columns // 4)} == {3}


def test_the_other_edits(page, editor, photo):
    take(page, photo)
    choose(page, "complete")
    assert page.value("keep_rows") == "4"
    page.draw(**{"class": "dog", "count": 1, "seed": 3, "keep_rows": 2})
    assert_drawn(page, editor.complete(photo, "dog", keep_rows=2, seed=3))
    choose(page, "vary")
    slide(page, "keep", 0.25)
    assert page.text("keep-value") == "0.25"
    page.draw(seed=4)
    assert_drawn(page, editor.vary(photo, "dog", keep=0.25, seed=4))
    choose(page, "outpaint")
    page.draw(below=3, right=5, seed=6)
    wanted = editor.outpaint(photo, "dog", below=3, right=5, seed=6)
    assert_drawn(page, wanted)
    image = "const i = document.querySelector('#latest img'); return "
    assert page.run(image + "[i.naturalWidth, i.naturalHeight]") == [52, 44]
    shape = page.run(image + "i.clientWidth / i.clientHeight")
    assert shape == pytest.approx(52 / 44, rel=0.02)
    # And without an image, as ever.
    page.press("remove-image")
    page.draw(seed=1)
    assert "edit" not in read_metadata(page.download())


def test_generated_image_is_edited(page, editor):
    page.draw(**{"class": "crane", "count": 1, "seed": 8})
    first = Image.open(page.download()).convert("RGB")
    page.press("#latest .card.done .edits")
    page.until(lambda: page.shown("canvas"))
    assert page.run("return document.activeElement.id") == "edit-kind"
    choose(page, "vary")
    page.draw(seed=2)
    assert_drawn(page, editor.vary(first, "crane", seed=2))


def test_blends_and_the_best_of_several(page, server):
    page.fill(blend="dog", best_of=3)
    slide(page, "blend_share", 0.3)
    assert page.text("share-value") == "0.3"
    page.draw(**{"class": "cat", "count": 2, "seed": 9})
    wanted = server.models["classes"].pipeline(
        "cat", blend="dog", blend_share=0.3, best_of=3, seed=9, num_images_per_prompt=2
    )
    assert page.seeds() == list(wanted.seeds)
    assert_drawn(page, wanted)
    page.view()
    assert "Blended withdog, 0.3" in page.text("viewer-settings")
    assert "Best of3" in page.text("viewer-settings")
    page.press("viewer-use")
    assert (page.value("blend"), page.value("best_of")) == ("dog", "")
    page.draw()
    assert page.seeds() == [wanted.seeds[0]]


def test_rejects_files_that_are_no_images(page, tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("no image")
    page.press("#edit summary")
    page.one("image").send_keys(str(path))
    page.until(lambda: page.run("return document.activeElement.id") == "image")
    assert not page.shown("canvas")
    page.draw(**{"class": "cat", "count": 1})
    assert len(page.cards()) == 1


def test_a_model_that_does_not_edit(server, visit):
    with running({"classes": tiny_pipeline()}, settings=ServerSettings(ui=True)) as plain:
        plain.models["classes"].engine.can_edit = False
        page = visit(plain.url)
        for name in ("edit", "blend", "best_of"):
            assert not page.shown(name)
        page.draw(**{"class": "cat", "count": 1})
        assert len(page.cards()) == 1
        assert not page.shown("#latest .card .edits")


def test_a_phone_and_names(page, photo):
    page.narrow()
    page.open()
    take(page, photo)
    for kind in ("inpaint", "complete", "outpaint", "vary"):
        choose(page, kind)
        assert page.overflow() <= 0
        tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        roles = {"textbox", "spinbutton", "combobox", "button", "slider", "checkbox", "application"}
        unnamed = [
            json.dumps(node["role"])
            for node in tree
            if not node["ignored"] and node["role"]["value"] in roles and not node["name"]["value"]
        ]
        assert unnamed == []
