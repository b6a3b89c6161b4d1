"""Draws the pictures of docs/editing.md with the models that come with the package.

    python docs/editing_gallery.py

Nothing is picked: images have seed 0, their edits count from 100 on, and whatever these give is
shown.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from llamagen import Editor, Pipeline, PipelineOutput
from llamagen.support.pictures import image_grid, save_png, stacked, titled

OUT = Path(__file__).parent / "images"
SHARES = (0.0, 0.25, 0.4, 0.5, 0.6, 0.75, 1.0)
RESULTS = 6
FIRST_SEED = 100
"""Another than the images' own: with the same numbers, the same codes would come again."""
SIDE = 96
"""Pixels of a picture on the sheet, about."""

Row = tuple[str, list[tuple[Image.Image, str]]]
"""What a row shows, and its pictures with their captions."""


def main() -> None:
    """Writes two sheets for each model, and one of extended images."""
    cifar, emoji = Pipeline.from_pretrained("cifar10"), Pipeline.from_pretrained("emoji")
    for pipe, names in (
        (cifar, ("horse", "ship", "truck")),
        (emoji, ("sunflower", "red apple", "octopus")),
    ):
        save_png(sheet(edits(pipe, *names[:2])), OUT / f"editing-{pipe.name}.png")
        save_png(sheet(choices(pipe, *names)), OUT / f"choosing-{pipe.name}.png")
    extended = [
        titled(extensions(pipe, names), name)
        for pipe, name, names in (
            (cifar, "cifar10", ("ship", "horse", "deer", "airplane")),
            (emoji, "emoji", ("sunflower", "red apple", "octopus", "rainbow")),
        )
    ]
    save_png(stacked(extended), OUT / "editing-outpaint.png")


def several(output: PipelineOutput, caption: str = "") -> list[tuple[Image.Image, str]]:
    """All images of a call, with the same caption."""
    return [(each, caption) for each in output.images]


def edits(pipe: Pipeline, first: str, second: str) -> list[Row]:
    """All edits of an image of the first class or text, one of them as the second."""
    editor = Editor(pipe)
    image = pipe(first, seed=0).images[0]
    mask = Image.new("L", editor.size)
    side = editor.size[0]
    ImageDraw.Draw(mask).rectangle((side // 4, side // 4, 5 * side // 8, 5 * side // 8), fill=255)
    upper = image.copy()
    upper.paste((255, 255, 255), (0, side // 2, side, side))
    hole = Image.composite(Image.new("RGB", image.size, "white"), image, mask)
    count = {"num_images_per_prompt": RESULTS, "seed": FIRST_SEED}
    variations = [
        (editor.vary(image, first, keep=keep, seed=FIRST_SEED + number).images[0], f"keep {keep}")
        for keep in (0.8, 0.5, 0.2)
        for number in (0, 1)
    ]
    completed = editor.complete(image, first, **count)
    filled = editor.inpaint(image, mask, first, **count)
    replaced = editor.inpaint(image, mask, second, **count)
    return [
        ("complete: the upper half is kept", [(upper, "kept"), *several(completed, first)]),
        ("inpaint: the square is drawn anew", [(hole, "kept"), *several(filled, first)]),
        (f"inpaint, as {second}", [(hole, "kept"), *several(replaced, second)]),
        ("vary: a share of the codes is kept", [(image, "image"), *variations]),
    ]


def choices(pipe: Pipeline, first: str, second: str, third: str) -> list[Row]:
    """Blends of the first with the second, leads away from the third, the best of several."""
    count = {"num_images_per_prompt": RESULTS + 1, "seed": FIRST_SEED}
    blends = [
        (pipe(first, blend=second, blend_share=share, seed=FIRST_SEED).images[0], f"{share:.2f}")
        for share in SHARES
    ]
    away = pipe(first, negative_prompt=third, **count)
    best = pipe(first, best_of=8, **count)
    fitting = pipe(first, best_of=8, rank_by="condition", **count)
    return [
        (f"blend: {first} with {second}, by share", blends),
        (f"towards {first}", several(pipe(first, **count))),
        (f"towards {first}, away from {third}", several(away)),
        ("the likeliest of 8", several(best)),
        ("of 8, the one that fits best", several(fitting)),
    ]


def extensions(pipe: Pipeline, names: tuple[str, ...]) -> Image.Image:
    """Images, and the same with half a grid more below and on the right."""
    editor = Editor(pipe)
    rows, columns = pipe.transformer.config.grid
    drawn = []
    for name in names:
        image = pipe(name, seed=0).images[0]
        wide = editor.outpaint(
            image, name, right=columns // 2, below=rows // 2, seed=FIRST_SEED
        ).images[0]
        left = Image.new("RGB", wide.size, "white")
        left.paste(image, (0, 0))
        drawn += [left, wide]
    return image_grid(drawn, columns=4, scale=max(1, 2 * SIDE // (3 * editor.size[0]) or 1))


def sheet(rows: list[Row]) -> Image.Image:
    """Rows with their titles, one below the other."""
    pictures = []
    for title, row in rows:
        images = [image for image, _ in row]
        captions = [caption for _, caption in row]
        grid = image_grid(
            images,
            columns=len(row),
            captions=captions if any(captions) else None,
            scale=max(1, SIDE // images[0].width),
        )
        pictures.append(titled(grid, title))
    return stacked(pictures)


if __name__ == "__main__":
    main()
