"""Generate images with the models that come with the package, and edit one of them.

    python examples/generate_and_edit.py                  (--quick: fewer of everything)
    python examples/generate_and_edit.py --model emoji --prompt "red heart" "full moon" pizza
    python examples/generate_and_edit.py --model cifar10 --image photo.jpg --prompt ship horse frog

Needs the extra "text" for prompts; takes seconds on a CPU. Writes a sheet of all images and some
single ones to --out. The cells can be pasted into a notebook.
"""

# %% Prompts and options
import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from llamagen import Editor, Pipeline, PipelineOutput
from llamagen.checkpoints import shipped_models
from llamagen.support.pictures import image_grid, save_png, stacked, titled

PROMPTS = {
    "emoji": ("sunflower", "red apple", "octopus"),
    "cifar10": ("horse", "ship", "truck"),
}

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--model", help="default: every model that comes with the package")
parser.add_argument("--prompt", nargs=3, help="three prompts or class names; needs --model")
parser.add_argument("--image", type=Path, help="image to edit; default: a generated one")
parser.add_argument("--out", type=Path, default=Path("runs/generate-and-edit"))
parser.add_argument("--quick", action="store_true", help="fewer images")
# A notebook has a command line of its own.
args = parser.parse_args([] if "ipykernel" in sys.modules else None)
if args.prompt and not args.model:
    parser.error("--prompt needs --model")
if args.model and not args.prompt and args.model not in PROMPTS:
    parser.error(f"{args.model} needs --prompt")

COUNT = 2 if args.quick else 6
"""Images of most rows."""
CANDIDATES = 2 if args.quick else 16
"""Candidates for the best image."""
SIDE = 128
"""Approximate pixels of an image on the sheet."""

Row = tuple[str, list[Image.Image], list[str]]
"""Title, images and captions of a row of the sheet."""


# %% Generation
def generated(pipe: Pipeline, first: str, second: str, third: str) -> list[Row]:
    """Return a row for each of the main settings; others keep the model's defaults."""
    rows: list[Row] = []

    # One image of each prompt. Class-conditional models take names or numbers of classes.
    prompts = [first, second, third]
    rows.append(("one image each, seed 0", pipe(prompts, seed=[0, 0, 0]).images, prompts))

    # Image i of a call has the seed ``seed + i``. The same seed, prompt and settings give the same
    # image, whatever else is in the batch.
    output = pipe(first, num_images_per_prompt=COUNT, seed=0)
    captions = [f"seed {seed}" for seed in output.seeds]
    rows.append((f"{first}: images of one call", output.images, captions))

    # Guidance: 1 is off. More follows the prompt more closely, with less variety.
    scales = (1.0, pipe.sampling.guidance_scale, 4.0)
    images = [only(pipe(first, guidance_scale=scale, seed=1)) for scale in scales]
    rows.append((f"{first}: guidance", images, [f"{scale:g}" for scale in scales]))

    # Guidance away from another prompt instead of from no prompt. A low scale is enough.
    images = [
        only(pipe(first, guidance_scale=1.5, seed=2)),
        only(pipe(first, guidance_scale=1.5, negative_prompt=second, seed=2)),
    ]
    rows.append((f"{first}: negative prompt, guidance 1.5", images, ["none", second]))

    # The best of several, by the likelihood of the codes, or by how much the prompt raises it.
    images = [
        only(pipe(first, seed=3)),
        only(pipe(first, best_of=CANDIDATES, rank_by="likelihood", seed=3)),
        only(pipe(first, best_of=CANDIDATES, rank_by="condition", seed=3)),
    ]
    captions = ["one sample", "by likelihood", "by condition"]
    rows.append((f"{first}: the best of {CANDIDATES}", images, captions))

    # Blends of two prompts. Codes are discrete, so images do not change smoothly.
    shares = (0.0, 0.5, 1.0) if args.quick else (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    images = [only(pipe(first, blend=second, blend_share=share, seed=4)) for share in shares]
    captions = [f"{share:.0%}" for share in shares]
    rows.append((f"{first} blended with {second}", images, captions))
    return rows


def only(output: PipelineOutput) -> Image.Image:
    """Return the image of a call for one image."""
    (image,) = output.images
    return image


# %% Editing
def edited(editor: Editor, image: Image.Image, prompt: str, to: Path) -> list[Row]:
    """Return a row for each edit of an image, which is cropped to the model's size.

    Codes are generated from the top left to the bottom right, conditioned on all codes before.
    """
    rows: list[Row] = []
    several = {"num_images_per_prompt": COUNT, "seed": 0}
    numbered = [f"seed {seed}" for seed in range(COUNT)]

    # Keep the upper rows of codes, generate the others.
    grid_rows, grid_columns = editor.pipeline.transformer.config.grid
    output = editor.complete(image, prompt, keep_rows=grid_rows // 2, **several)
    upper = image.copy()
    upper.paste("white", (0, image.height // 2, *image.size))
    rows.append(("complete", [upper, *output.images], ["kept", *numbered]))

    # Generate the white part of a mask, here an ellipse; the rest keeps its pixels. The mask may
    # also be a file, or an image with an alpha channel.
    mask = Image.new("L", editor.size)
    width, height = editor.size
    box = (width // 4, height // 4, 3 * width // 4, 3 * height // 4)
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    output = editor.inpaint(image, mask, prompt, **several)
    # `llamagen info FILE` shows the metadata, and `llamagen generate --like` uses it.
    save_png(output.images[0], Path(f"{to}-inpainted.png"), metadata=output.metadata[0])
    hole = Image.composite(Image.new("RGB", image.size, "white"), image, mask)
    captions = ["kept", *(f"seed {seed}" for seed in output.seeds)]
    rows.append(("inpaint", [hole, *output.images], captions))

    # Keep a random fraction of the codes.
    shares = (0.8, 0.5, 0.2)
    images = [only(editor.vary(image, prompt, keep=share, seed=0)) for share in shares]
    captions = ["image", *(f"{share:.0%} kept" for share in shares)]
    rows.append(("vary", [image, *images], captions))

    # Add codes on the right, or below.
    output = editor.outpaint(image, prompt, right=grid_columns // 2, **several)
    save_png(output.images[0], Path(f"{to}-outpainted.png"), metadata=output.metadata[0])
    rows.append(("outpaint to the right", output.images, numbered))
    return rows


# %% The sheet
def laid_out(rows: list[Row]) -> Image.Image:
    """Arrange the rows on a sheet."""
    strips = []
    for title, images, captions in rows:
        scale = max(1, SIDE // images[0].height)
        strip = image_grid(images, columns=len(images), captions=captions, scale=scale)
        strips.append(titled(strip, title))
    return stacked(strips)


args.out.mkdir(parents=True, exist_ok=True)
sheets = []
for name in [args.model] if args.model else shipped_models():
    # Or the name of a published model, a hub repository, or a folder.
    pipe = Pipeline.from_pretrained(name)
    editor = Editor(pipe)
    first, second, third = args.prompt or PROMPTS[name]
    output = pipe(first, seed=0)
    image = editor.prepare(args.image) if args.image else only(output)
    to = args.out / pipe.name
    save_png(only(output), Path(f"{to}.png"), metadata=output.metadata[0])
    rows = generated(pipe, first, second, third) + edited(editor, image, first, to)
    sheets.append(titled(laid_out(rows), pipe.name, size=24))
    print(f"{pipe.name}: {sum(len(images) for _, images, _ in rows)} images")
save_png(stacked(sheets), args.out / "sheet.png")
print(f"sheet of all images: {args.out / 'sheet.png'}")
