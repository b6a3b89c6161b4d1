"""Images that are completed, filled in, extended and varied."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from llamagen import Editor
from llamagen.pipeline import Pipeline
from llamagen.support.errors import InputError
from llamagen.support.pictures import arrays_to_pil, save_png
from tests.tiny_models import tiny_pipeline, tiny_text_pipeline


@pytest.fixture(scope="module")
def editor():
    return Editor(tiny_pipeline())


@pytest.fixture(scope="module")
def image():
    pixels = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    return arrays_to_pil(pixels)[0]


def mask(*box, size=(16, 16), mode="L"):
    """White inside ``box``, black outside."""
    whole = Image.new("L", size)
    whole.paste(255, box)
    return whole.convert(mode)


def pixels(image):
    return np.asarray(image)


def test_encodes_rgb_of_the_models_size(editor, image):
    assert torch.equal(editor.encode(image), editor.encode(image.convert("RGBA")))
    large = image.resize((48, 32), Image.Resampling.NEAREST)
    assert editor.prepare(large).size == (16, 16)
    assert editor.encode(large).shape == (4, 4)


def test_files_are_read(editor, image, tmp_path):
    save_png(image, tmp_path / "image.png")
    assert torch.equal(editor.encode(tmp_path / "image.png"), editor.encode(image))
    assert torch.equal(editor.encode(str(tmp_path / "image.png")), editor.encode(image))
    with pytest.raises(FileNotFoundError):
        editor.encode(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(InputError, match="not an image of a known format"):
        editor.encode(tmp_path / "text.png")
    with pytest.raises(InputError, match="not a readable image"):
        editor.inpaint(image, tmp_path / "text.png", "dog")


def test_the_upper_rows_stay(editor, image):
    codes = editor.encode(image)
    output = editor.complete(image, ["dog", "cat"], num_images_per_prompt=2, seed=3)
    assert output.codes.shape == (4, 4, 4)
    assert torch.equal(output.codes[:, :2], codes[:2].expand(4, -1, -1))
    assert len({tuple(each[2:].flatten().tolist()) for each in output.codes}) == 4
    assert output.seeds == (3, 4, 5, 6)
    assert output.metadata[0]["edit"] == {"kind": "complete", "keep_rows": 2}
    three = editor.complete(image, "dog", keep_rows=3, seed=3)
    assert torch.equal(three.codes[0, :3], codes[:3])


def test_a_completion_of_ones_own_image_is_that_image(editor):
    drawn = editor.pipeline("dog", seed=8)
    known = drawn.codes[0].clone()
    known[2:] = -1
    again = editor.pipeline("dog", seed=8, known_codes=known)
    assert torch.equal(again.codes, drawn.codes)


def test_unmasked_codes_stay(editor, image):
    codes = editor.encode(image)
    output = editor.inpaint(image, mask(5, 4, 9, 8), "dog", seed=1, num_images_per_prompt=2)
    for each in output.codes:
        # Two squares of four pixels, in the second row.
        changed = torch.ones(4, 4, dtype=torch.bool)
        changed[1, 1:3] = False
        assert torch.equal(each[changed], codes[changed])
    for drawn in output.images:
        outside = np.ones((16, 16), dtype=bool)
        outside[4:8, 5:9] = False
        assert np.array_equal(pixels(drawn)[outside], pixels(image)[outside])
        assert not np.array_equal(pixels(drawn)[~outside], pixels(image)[~outside])
    assert output.metadata[0]["edit"] == {"kind": "inpaint", "drawn_codes": 2}
    assert output.metadata[0]["best_of"] == 4


def test_pixels_may_be_those_of_the_codes(editor, image):
    output = editor.inpaint(image, mask(0, 0, 4, 4), "dog", seed=1, keep_pixels=False)
    assert np.array_equal(pixels(output.images[0]), pixels(editor.pipeline.decode(output.codes)[0]))


def test_masks_of_all_modes_mark_the_same(editor, image):
    wanted = editor.inpaint(image, mask(4, 4, 8, 12), "dog", seed=5).codes
    for mode in ("1", "RGB", "P"):
        again = editor.inpaint(image, mask(4, 4, 8, 12, mode=mode), "dog", seed=5).codes
        assert torch.equal(again, wanted)
    transparent = image.convert("RGBA")
    transparent.putalpha(mask(4, 4, 8, 12).point(lambda level: 255 - level))
    assert torch.equal(editor.inpaint(image, transparent, "dog", seed=5).codes, wanted)


def test_masks_go_through_the_crop_of_the_image(editor, image):
    large = image.resize((48, 32), Image.Resampling.NEAREST)
    # The middle of 48x32 is 8 pixels from the left.
    output = editor.inpaint(large, mask(8, 0, 16, 8, size=(48, 32)), "dog", seed=0)
    assert output.metadata[0]["edit"]["drawn_codes"] == 1
    model_sized = editor.inpaint(large, mask(0, 0, 4, 4), "dog", seed=0)
    assert torch.equal(model_sized.codes, output.codes)


def test_the_most_likely_of_several_is_taken(editor, image):
    from llamagen.generation.likelihood import code_log_likelihoods

    marked = mask(0, 0, 16, 8)
    all_of_them = editor.inpaint(image, marked, "dog", seed=0, best_of=1, num_images_per_prompt=6)
    best = editor.inpaint(image, marked, "dog", seed=0, best_of=6)
    scores = code_log_likelihoods(
        editor.pipeline.transformer, all_of_them.codes, torch.full((6,), 1)
    ).sum((1, 2))
    assert best.seeds == (int(scores.argmax()),)
    assert torch.equal(best.codes[0], all_of_them.codes[scores.argmax()])


@pytest.mark.parametrize(("below", "right"), [(3, 0), (0, 5), (2, 1), (6, 6)])
def test_a_larger_grid(editor, image, below, right):
    output = editor.outpaint(image, ["dog", "cat"], below=below, right=right, seed=2, best_of=2)
    assert output.codes.shape == (2, 4 + below, 4 + right)
    assert torch.equal(output.codes[0, :4, :4], editor.encode(image))
    assert int(output.codes.min()) >= 0
    assert output.images[0].size == (4 * (4 + right), 4 * (4 + below))
    assert output.seeds == (2, 4)
    assert output.metadata[1]["edit"] == {"kind": "outpaint", "below": below, "right": right}
    assert output.metadata[1]["seed"] == 4
    again = editor.outpaint(image, ["dog", "cat"], below=below, right=right, seed=2, best_of=2)
    assert torch.equal(again.codes, output.codes)


def test_larger_grid_is_generated_in_windows(editor, image):
    output = editor.outpaint(image, "dog", below=2, seed=2)
    window = torch.full((4, 4), -1)
    window[:2] = editor.encode(image)[2:]
    from llamagen.generation.request import derived_seed

    drawn = editor.pipeline("dog", known_codes=window, seed=derived_seed(2, 0))
    assert torch.equal(drawn.codes[0], output.codes[0, 2:])


@pytest.mark.parametrize("keep", [0.01, 0.25, 0.75])
def test_variations_keep_a_share(editor, image, keep):
    codes = editor.encode(image)
    output = editor.vary(image, "dog", keep=keep, seed=0, num_images_per_prompt=8)
    same = (output.codes == codes).flatten(1)
    assert bool((same.sum(1) >= max(1, round(16 * keep))).all())
    # Other places in every image.
    assert len({tuple(row) for row in same.tolist()}) > 4
    alone = editor.vary(image, "dog", keep=keep, seed=3)
    assert torch.equal(alone.codes[0], output.codes[3])


def test_texts(image):
    editor = Editor(tiny_text_pipeline())
    output = editor.complete(image, "a dog", negative_prompt="a cat", blend="a fox", seed=1)
    assert torch.equal(output.codes[0, :2], editor.encode(image)[:2])
    assert output.metadata[0]["blend"] == "a fox"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda e, i: e.complete(i, "dog", keep_rows=0), "keep_rows is 0, expected 1 to 3"),
        (lambda e, i: e.complete(i, "dog", keep_rows=4), "keep_rows is 4, expected 1 to 3"),
        (lambda e, i: e.complete(i, "wolf"), "wolf"),
        (lambda e, i: e.inpaint(i, mask(0, 0, 0, 0), "dog"), "the mask marks nothing"),
        (lambda e, i: e.inpaint(i, mask(0, 0, 16, 16), "dog"), "leaves no whole square"),
        (
            lambda e, i: e.inpaint(i, mask(0, 0, 4, 4, size=(15, 16)), "dog"),
            "the mask has 15x16 pixels, but the image has 16x16",
        ),
        (lambda e, i: e.outpaint(i, "dog"), "ask for at least one"),
        (lambda e, i: e.outpaint(i, "dog", below=-1, right=2), "none below 0"),
        (lambda e, i: e.vary(i, "dog", keep=0.0), "keep is 0.0, expected a share above 0"),
        (lambda e, i: e.vary(i, "dog", keep=1.0), "keep is 1.0"),
        (lambda e, i: e.vary(i, "dog", best_of=0), "best_of is 0, expected at least 1"),
        (lambda e, i: e.vary(i, "dog", rank_by="beauty"), "rank_by is 'beauty'"),
        (lambda e, i: e.vary(i, "dog", window=0), "window is 0"),
        (lambda e, i: e.complete(Image.new("F", (16, 16)), "dog"), "floating-point pixels"),
    ],
)
def test_rejects_impossible_edits(editor, image, edit, message):
    with pytest.raises(InputError, match=message):
        edit(editor, image)


def test_vllm_keeps_no_codes():
    pipe = tiny_pipeline()
    pipe = Pipeline(pipe.tokenizer, pipe.transformer, labels=pipe.labels, engine="vllm")
    with pytest.raises(InputError, match="edit with engine 'native'"):
        Editor(pipe)
    for settings in ({"blend": "cat"}, {"known_codes": torch.full((4, 4), -1)}):
        with pytest.raises(InputError, match="goes with engine 'native'"):
            pipe("dog", **settings)


def test_outputs_stay_as_they_were_declared(editor, image):
    output = editor.vary(image, "dog", seed=0, output_type="codes")
    assert output.images == []
    assert dataclasses.asdict(output)["seeds"] == (0,)


def squares(editor, image, given) -> list[list[int]]:
    """Rows and columns of the codes that a mask marks."""
    return (editor.inpainting(image, given).codes < 0).nonzero().tolist()


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """An image that its EXIF tag turns upright."""
    back = {3: 180, 6: 90, 8: 270}[orientation]
    stored = image.rotate(back, expand=True)
    stored.getexif()[0x0112] = orientation
    return stored


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_masks_are_turned_by_their_exif_tag(editor, image, orientation, tmp_path):
    wide = image.resize((32, 16))
    marked = mask(8, 0, 16, 8, size=(32, 16))
    wanted = squares(editor, wide, marked)
    assert wanted == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert squares(editor, wide, turned(marked, orientation)) == wanted
    stored = turned(marked, orientation)
    stored.save(tmp_path / "mask.png", exif=stored.getexif())
    assert squares(editor, wide, tmp_path / "mask.png") == wanted


@pytest.mark.parametrize("side", [16, 17, 33, 100, 512])
@pytest.mark.parametrize("stroke", [1, 2, 5])
def test_any_marked_pixel_marks_its_square(editor, side, stroke):
    photo = Image.new("RGB", (side, side))
    for at in {0, side // 3, side // 2, side - stroke}:
        line = mask(at, 0, at + stroke, side, size=(side, side))
        # A column of codes is side / 4 pixels wide.
        columns = {x * 4 // side for x in range(at, at + stroke)}
        ends = {(4 * at) // side, -(-4 * (at + stroke) // side) - 1}
        found = squares(editor, photo, line)
        assert columns <= {column for _, column in found}
        # A pixel of the model that lies across two squares' border may mark both.
        assert {column for _, column in found} <= {*range(min(ends) - 1, max(ends) + 2)}
        assert {row for row, _ in found} == {0, 1, 2, 3}


def test_single_pixels_of_large_masks(editor):
    photo = Image.new("RGB", (1200, 800))
    for x, y in [(201, 3), (650, 421), (998, 799)]:
        # The middle 800 of 1200 pixels, in squares of 200.
        assert squares(editor, photo, mask(x, y, x + 1, y + 1, size=photo.size)) == [
            [y // 200, (x - 200) // 200]
        ]
    with pytest.raises(InputError, match="the mask marks nothing"):
        editor.inpainting(photo, mask(0, 0, 200, 800, size=photo.size))


def test_pixels_that_are_not_marked_stay_with_thin_strokes(editor):
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    photo = Image.fromarray(noise)
    drawn = editor.inpaint(photo, mask(30, 0, 31, 64, size=photo.size), "dog", seed=0).images[0]
    same = (pixels(drawn) == pixels(editor.prepare(photo))).all((0, 2))
    assert same.tolist() == [column != 7 for column in range(16)]


@pytest.mark.parametrize("alpha", [255, 254, 128])
def test_hardly_transparent_masks_are_read_by_their_colours(editor, image, alpha):
    marked = mask(4, 4, 8, 12).convert("RGBA")
    wanted = squares(editor, image, mask(4, 4, 8, 12))
    marked.putpixel((0, 0), (0, 0, 0, alpha))
    assert squares(editor, image, marked) == wanted
    marked.putalpha(alpha)
    assert squares(editor, image, marked) == wanted


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_masks_mark_what_is_transparent(editor, image, mode):
    holes = Image.new("LA", (16, 16), (255, 255))
    holes.paste((255, 0), (4, 4, 8, 12))
    if mode == "P":
        given = mask(4, 4, 8, 12).point(lambda level: level // 255).convert("P")
        given.info["transparency"] = 1
    else:
        given = holes.convert("RGBA") if mode == "RGBA" else holes.convert(mode)
    assert squares(editor, image, given) == [[1, 1], [2, 1]]


def test_deep_greys_of_masks_are_scaled(editor, image, tmp_path):
    for background, wanted in ((300, [[1, 1]]), (32767, [[1, 1]])):
        greys = np.full((16, 16), background, np.uint16)
        greys[4:8, 4:8] = 65535
        assert squares(editor, image, Image.fromarray(greys)) == wanted
        Image.fromarray(greys).save(tmp_path / "deep.png")
        assert squares(editor, image, tmp_path / "deep.png") == wanted
        assert squares(editor, image, Image.fromarray(greys.astype(np.int32))) == wanted


def test_modes_of_masks_without_a_white_are_refused(editor, image):
    with pytest.raises(InputError, match="floating-point pixels"):
        editor.inpainting(image, Image.new("F", (16, 16)))


@pytest.mark.parametrize("below", [0, 2])
def test_forms_of_edited_images(editor, image, below):
    def edited(output_type):
        if below:
            return editor.outpaint(image, "dog", below=below, seed=2, output_type=output_type)
        return editor.inpaint(image, mask(4, 4, 8, 8), "dog", seed=2, output_type=output_type)

    whole = edited("pil")
    arrays = np.stack(list(map(pixels, whole.images))).astype(np.float32) / 255
    assert np.array_equal(edited("np").images, arrays)
    assert np.array_equal(edited("pt").images, arrays.transpose(0, 3, 1, 2))
    assert torch.equal(edited("latent").images, whole.codes)
    with pytest.raises(InputError, match="output_type is 'PIL'"):
        edited("PIL")


def test_numbers_of_numpy_and_torch(editor, image):
    wanted = editor.vary(image, ["dog", "cat"], keep=0.5, seed=[3, 4])
    again = editor.vary(image, np.array([1, 0]), keep=np.float32(0.5), seed=torch.tensor([3, 4]))
    assert torch.equal(again.codes, wanted.codes)
    edits = [
        again,
        editor.complete(image, np.int64(1), keep_rows=torch.tensor(2), seed=np.int64(3)),
        editor.outpaint(image, "dog", below=np.int64(1), right=torch.tensor(1), best_of=np.int8(2)),
        editor.vary(image, "dog", generator=torch.Generator().manual_seed(0)),
    ]
    for output in edits:
        assert json.loads(json.dumps(output.metadata[0])) == output.metadata[0]
    for settings in ({"keep_rows": 2.0}, {"keep_rows": "2"}):
        with pytest.raises(InputError, match=r"keep_rows is .*, expected an integer"):
            editor.complete(image, "dog", **settings)


class TestAnyOrder:
    """A model of random order reads what is kept on all sides before it draws."""

    @pytest.fixture
    def editor(self):
        return Editor(tiny_pipeline(order="random"))

    def test_what_is_below_decides_what_is_drawn(self, editor, image):
        """The raster model's codes cannot depend on it."""
        other = image.copy()
        other.paste((255, 0, 0), (0, 12, 16, 16))
        top = mask(0, 0, 16, 8)
        for own, depends in ((editor, True), (Editor(tiny_pipeline()), False)):
            drawn = [
                own.inpaint(each, top, "dog", seed=3, best_of=1, top_k=20).codes[0, :2]
                for each in (image, other)
            ]
            assert not torch.equal(own.encode(image)[3], own.encode(other)[3])
            assert torch.equal(*drawn) == (not depends)

    def test_one_candidate_by_default(self, editor, image):
        assert editor.inpainting_candidates == 1
        output = editor.inpaint(image, mask(4, 4, 12, 12), "dog", seed=3)
        assert output.seeds == (3,)
        assert output.codes.shape == (1, 4, 4)
        again = editor.inpaint(image, mask(4, 4, 12, 12), "dog", seed=3, best_of=1, steps=2)
        kept = torch.ones(4, 4, dtype=torch.bool)
        kept[1:3, 1:3] = False
        for codes in (output.codes[0], again.codes[0]):
            assert torch.equal(codes[kept], editor.encode(image)[kept])

    @pytest.mark.parametrize(
        "sides", [{"above": 3}, {"left": 5}, {"above": 1, "below": 2, "left": 3, "right": 6}]
    )
    def test_all_sides(self, editor, image, sides):
        above, left = sides.get("above", 0), sides.get("left", 0)
        output = editor.outpaint(image, "dog", seed=1, num_images_per_prompt=2, **sides)
        rows = 4 + above + sides.get("below", 0)
        columns = 4 + left + sides.get("right", 0)
        assert output.codes.shape == (2, rows, columns)
        assert output.images[0].size == (4 * columns, 4 * rows)
        kept = output.codes[:, above : above + 4, left : left + 4]
        assert torch.equal(kept, editor.encode(image).expand(2, -1, -1))
        assert (output.codes >= 0).all()
        assert not torch.equal(output.codes[0], output.codes[1])
        about = output.metadata[0]["edit"]
        assert about == {"kind": "outpaint", "above": 0, "below": 0, "left": 0, "right": 0, **sides}

    def test_each_position_sees_what_is_there(self, editor, image):
        edit = editor.outpainting(image, above=6, left=6, below=6, right=6)
        known = edit.codes >= 0
        for window in edit.windows:
            assert window.of(known).any()
            window.of(known).fill_(True)
        assert known.all()

    def test_raster_models_draw_below_and_on_the_right(self, image):
        with pytest.raises(InputError, match="only below and on the right of what is there"):
            Editor(tiny_pipeline()).outpaint(image, "dog", above=1)
