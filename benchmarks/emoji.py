"""Quality of a text-conditional model of emoji: those it has seen, and combinations it has not.

    python benchmarks/emoji.py split emoji/              # writes train.csv and held-out.csv there
    python benchmarks/emoji.py measure emoji/ --model runs/emoji/pipeline

Held out is one of the five skin tones of every fourth person, hand or face that comes in all five.
Measured are

- seen: of 200 prompts of train.csv, the share whose image is nearer to the requested emoji than to
  any other of train.csv, by pixels and by the tokenizer's latents (mean squared error);
  the same by pixels for clock times, letters, hearts and the like;
- tone: of the prompts of held-out.csv, the share with the right skin tone. The pixels
  in which the five real tones of that emoji differ are compared with each of the five;
- psnr: of the tokenizer's reconstructions of held-out.csv, which it must not have been trained on.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import re
from pathlib import Path

import numpy as np
import torch
from common import evenly, print_table, record
from PIL import Image
from torch import Tensor

from llamagen import Pipeline
from llamagen.data.images import open_image
from llamagen.data.views import center_crop
from llamagen.evaluation.metrics import psnr
from llamagen.models.tokenizer import images_to_uint8, uint8_to_images
from llamagen.support.pictures import image_grid, save_png

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
EVERY = 4
"""One in so many emoji with five tones has a tone held out."""
PROMPTS = 200
SHOWN = 64
KINDS = {
    "clock times": r"o.clock$|-thirty$",
    "keycaps and letters": r"^keycap|button \(blood type\)$|^[A-Z!]+ button$",
    "hearts": r" heart$",
    "coloured shapes": r"(red|orange|yellow|green|blue|purple|brown) .*(circle|square)$",
    "flags": r" flag$",
    "hair": r"hair$",
}
MAX_OF_KIND = 60
"""Emoji of each kind that are generated."""
DIFFERENT = 24
"""Pixels count for the tone where the five differ by at least this on average, of 255."""

Row = dict[str, str]


def read_rows(table: Path) -> list[Row]:
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def in_five_tones(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """Emoji in all five tones: text without the tone -> tone -> row."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        match = re.fullmatch(rf"(.*) ({'|'.join(TONES)}) skin tone", row["text"])
        if match and "skin tone" not in match[1]:
            found.setdefault(match[1], {})[match[2]] = row
    return {base: tones for base, tones in sorted(found.items()) if len(tones) == len(TONES)}


def split(folder: Path) -> None:
    rows = read_rows(folder / "metadata.csv")
    chosen = list(in_five_tones(rows).values())[::EVERY]
    held_out = [tones[TONES[number % len(TONES)]] for number, tones in enumerate(chosen)]
    files = {row["file_name"] for row in held_out}
    training = [row for row in rows if row["file_name"] not in files]
    for name, part in (("train.csv", training), ("held-out.csv", held_out)):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(part)
        print(f"{len(part)} emoji in {folder / name}")


def load(folder: Path, rows: list[Row], side: int) -> np.ndarray:
    """(N, side, side, 3) bytes."""
    images = [center_crop(open_image(folder / row["file_name"]), side) for row in rows]
    return np.stack([np.asarray(image) for image in images])


def nearest(samples: np.ndarray, known: np.ndarray) -> np.ndarray:
    """For each row of ``samples`` (N, ...), the row of ``known`` (M, ...) nearest to it."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (samples, known))
    return (np.square(b).sum(1) - 2 * a @ b.T).argmin(1)


def share_found(chosen: np.ndarray, samples: np.ndarray, known: np.ndarray) -> float:
    """Share of samples whose nearest image is the chosen one, or one equal to it."""
    found = nearest(samples, known)
    same = [np.array_equal(known[a], known[b]) for a, b in zip(chosen, found, strict=True)]
    return float(np.mean(same))


def tone_of(sample: np.ndarray, variants: np.ndarray) -> int:
    """The one of the five real variants (5, H, W, 3) whose tone an image (H, W, 3) has."""
    real = variants.astype(np.float64)
    counts = real.std(0).mean(-1) >= DIFFERENT / 2
    errors = np.abs(real - sample)[:, counts].mean((1, 2))
    return int(errors.argmin())


@torch.inference_mode()
def latents(pipe: Pipeline, images: np.ndarray) -> np.ndarray:
    pixels = torch.from_numpy(images).movedim(-1, 1)
    parts: list[Tensor] = []
    for part in pixels.split(64):
        found = pipe.tokenizer.encode_latents(uint8_to_images(part.to(pipe.device)))
        parts.append(pipe.tokenizer.quantize.compared(found).cpu())
    return torch.cat(parts).numpy()


@torch.inference_mode()
def reconstructed(pipe: Pipeline, images: np.ndarray) -> np.ndarray:
    pixels = torch.from_numpy(images).movedim(-1, 1).to(pipe.device)
    found = pipe.tokenizer.decode(pipe.tokenizer.encode(uint8_to_images(pixels)))
    return images_to_uint8(found).movedim(1, -1).cpu().numpy()


def measure(folder: Path, model: str, out: Path, seed: int) -> None:
    rows, held_out = (read_rows(folder / name) for name in ("train.csv", "held-out.csv"))
    pipe = Pipeline.from_pretrained(model)
    side = pipe.transformer.config.grid[0] * pipe.tokenizer.config.downsampling
    known, real = load(folder, rows, side), load(folder, held_out, side)
    out.mkdir(parents=True, exist_ok=True)

    chosen = evenly(len(rows), PROMPTS)
    samples = generate(pipe, [rows[index]["text"] for index in chosen], seed)
    shown = evenly(len(chosen), SHOWN)
    captions = [short(rows[chosen[index]]["text"]) for index in shown]
    save_sheet(samples[shown], captions, out / "seen.png")
    results: dict[str, object] = {
        "model": pipe.name,
        "seed": seed,
        "sampling": dataclasses.asdict(pipe.sampling),
        "seen, by pixels": share_found(chosen, samples, known),
        "seen, by latents": share_found(chosen, latents(pipe, samples), latents(pipe, known)),
    }
    for kind, pattern in KINDS.items():
        of_kind = [n for n, row in enumerate(rows) if re.search(pattern, row["text"])][:MAX_OF_KIND]
        images = generate(pipe, [rows[index]["text"] for index in of_kind], seed)
        name = f"seen, {kind} ({len(of_kind)})"
        results[name] = share_found(np.array(of_kind), images, known)

    new = generate(pipe, [row["text"] for row in held_out], seed)
    pairs = np.stack([new, real], axis=1).reshape(-1, *new.shape[1:])
    names = [x for row in held_out for x in (short(row["text"]), "real")]
    save_sheet(pairs, names, out / "held-out.png", columns=12)
    results["tone"] = tones_right(folder, rows, held_out, new)
    results["psnr"] = float(psnr(real, reconstructed(pipe, real)).mean())
    print_table(["measure", "value"], [[k, str(v)] for k, v in results.items()])
    record("emoji", results)


def generate(pipe: Pipeline, prompts: list[str], seed: int) -> np.ndarray:
    """An image of each prompt (N, H, W, 3)."""
    return np.stack([np.asarray(image) for image in pipe(prompts, seed=seed).images])


def tones_right(folder: Path, rows: list[Row], held_out: list[Row], new: np.ndarray) -> float:
    """Share of new images (N, H, W, 3) with the requested tone."""
    variants = in_five_tones([*rows, *held_out])
    right = []
    for row, image in zip(held_out, new, strict=True):
        (tones,) = [each for each in variants.values() if row in each.values()]
        five = load(folder, [tones[tone] for tone in TONES], image.shape[0])
        right.append(tone_of(image, five) == TONES.index(tone_name(row)))
    return float(np.mean(right))


def tone_name(row: Row) -> str:
    return row["text"].removesuffix(" skin tone").rsplit(" ", 1)[1]


def short(text: str) -> str:
    return text.replace(" skin tone", "")


def save_sheet(images: np.ndarray, captions: list[str], path: Path, columns: int = 8) -> None:
    pictures = [Image.fromarray(image) for image in images]
    save_png(image_grid(pictures, columns=columns, captions=captions, scale=2), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["split", "measure"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji-measured"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.action == "split":
        split(arguments.folder)
    elif arguments.model is None:
        parser.error("measure needs --model")
    else:
        measure(arguments.folder, arguments.model, arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
