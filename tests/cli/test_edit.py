import numpy as np
import pytest
from PIL import Image

from llamagen import Editor, Pipeline
from llamagen.support.pictures import arrays_to_pil, read_metadata, save_png


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 24, 16, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    save_png(arrays_to_pil(pixels)[0], path)
    return path


@pytest.fixture
def mask(tmp_path):
    whole = Image.new("L", (16, 24))
    whole.paste(255, (4, 8, 12, 16))
    path = tmp_path / "mask.png"
    save_png(whole, path)
    return path


@pytest.fixture
def edit(run, model_folder, image, tmp_path):
    def run_edit(how, *arguments):
        words = ("--model", model_folder, "--out", tmp_path / "out", *arguments)
        return run("edit", how, image, *words)

    return run_edit


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_complete(edit, model_folder, image, tmp_path):
    result = edit("complete", "--class", "dog", "-n", 2, "--seed", 7, "--keep-rows", 1)
    assert result.status == 0, result.err
    names = [line.rpartition("/")[2] for line in result.out.splitlines()]
    assert names == ["dog-7.png", "dog-8.png", "sheet.png"]
    metadata = read_metadata(tmp_path / "out" / "dog-8.png")
    assert metadata["edit"] == {"kind": "complete", "keep_rows": 1}
    editor = Editor(Pipeline.from_pretrained(model_folder))
    wanted = editor.complete(image, "dog", keep_rows=1, seed=8).images[0]
    assert np.array_equal(pixels(tmp_path / "out" / "dog-8.png"), np.asarray(wanted))


def test_inpaint(edit, mask, tmp_path):
    result = edit("inpaint", "--mask", mask, "-c", "dog", "--seed", 1, "--best-of", 2)
    assert result.status == 0, result.err
    # Of two candidates, with seeds 1 and 2, one is kept.
    metadata = read_metadata(next((tmp_path / "out").iterdir()))
    assert metadata["seed"] in (1, 2)
    assert metadata["edit"]["kind"] == "inpaint"
    assert metadata["best_of"] == 2


def test_outpaint(edit, tmp_path):
    result = edit("outpaint", "-c", "dog", "--seed", 1, "--below", 2, "--right", 3)
    assert result.status == 0, result.err
    assert pixels(tmp_path / "out" / "dog-1.png").shape == (24, 28, 3)


def test_vary(edit, model_folder, image, tmp_path):
    settings = ("--keep", 0.25, "--blend", "cat", "--blend-share", 0.3, "--top-k", 9)
    result = edit("vary", "-c", "dog", "--seed", 1, *settings)
    assert result.status == 0, result.err
    editor = Editor(Pipeline.from_pretrained(model_folder))
    wanted = editor.vary(image, "dog", keep=0.25, seed=1, blend="cat", blend_share=0.3, top_k=9)
    assert np.array_equal(pixels(tmp_path / "out" / "dog-1.png"), np.asarray(wanted.images[0]))


def test_an_edited_image_is_not_made_again(edit, run, model_folder, tmp_path):
    edit("complete", "-c", "dog", "--seed", 1)
    result = run("generate", "--model", model_folder, "--like", tmp_path / "out" / "dog-1.png")
    assert result.status == 2
    assert "was edited from another image" in result.err


@pytest.mark.parametrize(
    ("how", "arguments", "message"),
    [
        ("complete", (), "say what the image is of, with either --prompt or --class"),
        ("complete", ("-c", "dog", "-p", "a dog"), "with either --prompt or --class"),
        ("complete", ("-c", "dog", "--keep-rows", 9), "keep_rows is 9, expected 1 to 3"),
        ("complete", ("-c", "wolf"), "wolf"),
        ("outpaint", ("-c", "dog"), "ask for at least one"),
        ("inpaint", ("-c", "dog", "--mask", "none.png"), "none.png does not exist"),
        ("vary", ("-c", "dog", "--keep", 2), "keep is 2.0, expected a share"),
    ],
)
def test_rejects_arguments(edit, tmp_path, how, arguments, message):
    result = edit(how, *arguments)
    assert result.status == 2
    assert message in result.err
    assert len(result.err.splitlines()) == 1
    assert not list(tmp_path.glob("out/*"))


def test_no_image(run, model_folder, tmp_path):
    result = run("edit", "vary", tmp_path / "none.png", "--model", model_folder, "-c", "dog")
    assert result.status == 2
    assert "none.png does not exist; give an image file" in result.err


def test_blends_and_choices_of_generate(run, model_folder, tmp_path):
    words = ("generate", "--model", model_folder, "--seed", 3, "--out")
    blended = ("-c", "dog", "--blend", "cat", "--blend-share", 0.25, "--best-of", 3)
    result = run(*words, tmp_path / "first", *blended, "--rank-by", "condition")
    assert result.status == 0, result.err
    made = next((tmp_path / "first").iterdir())
    metadata = read_metadata(made)
    assert (metadata["blend"], metadata["blend_share"]) == ("cat", 0.25)
    assert (metadata["best_of"], metadata["rank_by"]) == (3, "condition")
    again = run(
        "generate", "--model", model_folder, "--like", made, "--out", tmp_path / "again.png"
    )
    assert again.status == 0, again.err
    assert np.array_equal(pixels(tmp_path / "again.png"), pixels(made))
