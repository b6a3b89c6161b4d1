"""Masks and other plans of edits: which codes and pixels are drawn anew."""

from __future__ import annotations

import functools
from fractions import Fraction

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st
from PIL import Image

from llamagen import Editor
from tests.properties.checking import answer, holds_for, new_folder
from tests.tiny_models import tiny_pipeline

SIDE, CODE, CODES = 16, 4, 4
"""Of the tiny model: pixels of an image, of a code's square, and codes of a row."""
LEVELS = st.sampled_from([0, 1, 60, 100, 160, 200, 254, 255])
"""Greys that nobody would take for the other colour."""
UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.T,
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].T,
    8: lambda stored: np.rot90(stored, 1),
}
"""What a viewer shows of pixels stored with an EXIF orientation."""


@functools.cache
def editor():
    return Editor(tiny_pipeline())


def picture(height, width):
    rng = np.random.default_rng(height * width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@st.composite
def strokes(draw, height, width, levels=None, background=0):
    """Boxes of some levels on a background, many of them thin; (height, width) uint8."""
    mask = np.full((height, width), background, np.uint8)
    levels = st.just(255) if levels is None else levels
    for _ in range(draw(st.integers(1, 4))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        down = draw(st.integers(1, 2) | st.integers(1, height))
        across = draw(st.integers(1, 2) | st.integers(1, width))
        mask[top : top + down, left : left + across] = draw(levels)
    return mask


def drawn(image, mask):
    """The codes (4, 4) that inpainting draws, None where the mask is refused."""
    plan = answer(lambda: editor().inpainting(image, mask))
    return plan and (plan.codes < 0).tolist()


def squares(marked, scale=Fraction(1), left=0, top=0):
    """The codes of which marked pixels (height, width) lie in the square, None for none or all.

    ``scale`` pixels of the image are one of the model's, whose image begins at ``left``, ``top``.
    """
    codes = [[False] * CODES for _ in range(CODES)]
    for y, x in np.argwhere(marked).tolist():
        for row in range(CODES):
            for column in range(CODES):
                first_y, first_x = (top + row * CODE) * scale, (left + column * CODE) * scale
                codes[row][column] |= (first_y - 1 < y < first_y + CODE * scale) and (
                    first_x - 1 < x < first_x + CODE * scale
                )
    found = sum(map(sum, codes))
    return codes if 0 < found < CODES**2 else None


@holds_for(mask=strokes(SIDE, SIDE, LEVELS))
def test_a_code_is_drawn_if_any_pixel_of_its_square_is_marked(mask):
    assert drawn(picture(SIDE, SIDE), Image.fromarray(mask)) == squares(mask >= 128)


@holds_for(
    cost=2,
    scale=st.sampled_from([Fraction(1, 2), Fraction(2), Fraction(3), Fraction(4)]),
    beside=st.integers(0, 3),
    tall=st.booleans(),
    data=st.data(),
)
def test_marks_on_images_of_other_sizes_are_not_lost(scale, beside, tall, data):
    # Beside the middle square, as many pixels of the model's on both sides.
    short, long = int(SIDE * scale), int((SIDE + 2 * beside) * scale)
    height, width = (long, short) if tall else (short, long)
    mask = data.draw(strokes(height, width))
    left, top = (0, beside) if tall else (beside, 0)
    expected = squares(mask >= 128, scale, left, top)
    assert drawn(picture(height, width), Image.fromarray(mask)) == expected


@holds_for(
    tall=st.booleans(), orientation=st.integers(1, 8), in_memory=st.booleans(), data=st.data()
)
def test_a_mask_is_upright_by_its_exif_orientation(tall, orientation, in_memory, data):
    height, width = (32, 16) if tall else (16, 32)
    turned = orientation >= 5
    stored = data.draw(strokes(width, height) if turned else strokes(height, width))
    upright = Image.fromarray(np.ascontiguousarray(UPRIGHT[orientation](stored)))
    image = picture(height, width)
    with new_folder() as folder:
        path = folder / "mask.png"
        tag = Image.Exif()
        tag[0x112] = orientation
        Image.fromarray(stored).save(path, exif=tag)
        found = drawn(image, Image.open(path) if in_memory else path)
    assert found == drawn(image, upright)


@holds_for(
    mask=strokes(SIDE, SIDE, LEVELS),
    mode=st.sampled_from(["1", "P", "RGB", "RGBA", "LA", "I;16", "I"]),
)
def test_masks_of_all_modes_and_depths_mark_the_same(mask, mode):
    plain = Image.fromarray(mask)
    if mode.startswith("I"):
        deep = mask.astype(np.uint16) * 257
        other = Image.fromarray(deep if mode == "I;16" else deep.astype(np.int32))
    else:
        other = plain.point(lambda level: 255 * (level >= 128)) if mode == "1" else plain
        other = other.convert(mode)
    with new_folder() as folder:
        # PNG has no 32 bits.
        path = folder / ("mask.tif" if mode == "I" else "mask.png")
        other.save(path)
        image = picture(SIDE, SIDE)
        assert drawn(image, other) == drawn(image, path) == drawn(image, plain)


@holds_for(
    mask=strokes(SIDE, SIDE),
    alpha=strokes(SIDE, SIDE, st.just(0), background=255)
    | strokes(SIDE, SIDE, st.integers(250, 254), background=255),
)
def test_only_real_transparency_marks(mask, alpha):
    levels = Image.fromarray(mask)
    both = Image.merge("LA", (levels, Image.fromarray(alpha)))
    expected = alpha == 0 if (alpha == 0).any() else mask >= 128
    assert drawn(picture(SIDE, SIDE), both) == squares(expected)


@holds_for(mask=strokes(SIDE, SIDE))
def test_unmarked_pixels_stay(mask):
    image, other = picture(SIDE, SIDE), picture(SIDE, SIDE).rotate(90)
    plan = answer(lambda: editor().inpainting(image, Image.fromarray(mask)))
    assume(plan is not None)
    expected = np.where((mask >= 128)[..., None], np.asarray(other), np.asarray(image))
    assert np.array_equal(np.asarray(plan.finish(other)), expected)


@holds_for(rows=st.integers(-2, 6) | st.none())
def test_a_completion_keeps_the_rows_asked_for(rows):
    image = picture(SIDE, SIDE)
    kept = CODES // 2 if rows is None else rows
    if not 0 < kept < CODES:
        assert answer(lambda: editor().completion(image, keep_rows=rows)) is None
        return
    codes = editor().completion(image, keep_rows=rows).codes
    assert torch.equal(codes[:kept], editor().encode(image)[:kept])
    assert (codes[kept:] < 0).all()


@holds_for(
    keep=st.floats(-0.5, 1.5), seeds=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=3)
)
def test_a_variation_keeps_the_share_asked_for(keep, seeds):
    image = picture(SIDE, SIDE)
    plan = answer(lambda: editor().variation(image, keep=keep))
    assert (plan is not None) == (0 < keep < 1)
    if plan is None:
        return
    known = plan.known(seeds)
    assert ((known == plan.codes) | (known < 0)).all()
    assert {int((each >= 0).sum()) for each in known} == {max(1, round(keep * CODES**2))}
    assert torch.equal(known[-1], plan.known(seeds[-1:])[0])


@holds_for(below=st.integers(-1, 12), right=st.integers(-1, 12))
def test_windows_of_an_extension_draw_each_code_once(below, right):
    plan = answer(lambda: editor().outpainting(picture(SIDE, SIDE), below=below, right=right))
    assert (plan is not None) == (min(below, right) >= 0 and below + right > 0)
    if plan is None:
        return
    known = (plan.codes >= 0).clone()
    assert known.shape == (CODES + below, CODES + right)
    for window in plan.windows:
        part = window.of(known)
        assert part.shape == (CODES, CODES)
        # Something is there already to go on from, and something is missing.
        assert part.any()
        assert not part.all()
        part.fill_(True)
    assert known.all()
    assert len({window.seed(7) for window in plan.windows}) == len(plan.windows)
