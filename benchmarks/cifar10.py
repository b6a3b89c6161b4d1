r"""Quality of a class-conditional model of CIFAR-10, judged by a small classifier of its own.

    python benchmarks/cifar10.py train-classifier cifar10/train --out runs/classifier.safetensors
    python benchmarks/cifar10.py measure cifar10/train --model runs/cifar10-transformer/pipeline \
        --classifier runs/classifier.safetensors
    python benchmarks/cifar10.py sweep cifar10/train --model runs/cifar10-transformer/pipeline \
        --classifier runs/classifier.safetensors --guidance 1 1.5 2 3 4 --top-k 0 256

The images are in a folder for each class. Held out is what a recipe with the same fraction holds
out, so neither the classifier nor the model has been trained on it. Measured are

- recognised: the share of samples in which the classifier finds the requested class; the same for
  real held-out images, and for the tokenizer's reconstructions of them;
- frechet: the Frechet distance of the classifier's features to those of all training images, of
  the samples, of as many held-out images and of their reconstructions. It compares models that
  were judged by one and the same classifier, and is no published FID;
- copies: the share of samples as near to a training image or its mirror image as a reconstruction
  of it would be. A model that copies generates a reconstruction at best. Reconstructions of
  held-out images are the baseline, since smooth pictures are near to others;
- psnr and codebook: of the tokenizer on held-out images.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cifar10_classifier as judging
import numpy as np
import torch
from cifar10_classifier import SIDE, About, Classifier, Judged, Training
from common import evenly, machine, print_table, record

from llamagen import Pipeline
from llamagen.data.images import ImageCollection
from llamagen.evaluation.metrics import (
    FeatureStatistics,
    codebook_use,
    frechet_distance,
    nearest,
    psnr,
)
from llamagen.evaluation.samples import SamplePlan, draw_samples
from llamagen.models.tokenizer import images_to_uint8, uint8_to_images
from llamagen.support.errors import InputError
from llamagen.support.pictures import arrays_to_pil, image_grid, save_png
from llamagen.support.storage import write_json

HELD_OUT = 0.1
WIDTHS = (64, 128, 256)
JUDGED = 1000
"""Samples that are classified and compared with every training image."""
CALIBRATED_BY = 2000
"""Training images whose reconstructions calibrate the distance of copies."""
PERCENTILE = 90
"""Percent of the copies found, if they are as good as reconstructions."""
SLACK = 1.2
"""Maximum distance of a copy, in units of the distance of the original's reconstruction."""
SHOWN = 32
PAIRS_NAME = "nearest.png"
_PART = 500


class Bench(NamedTuple):
    """Models and images of a measurement."""

    pipe: Pipeline
    judge: Classifier
    training: np.ndarray
    """(M, 32, 32, 3) bytes."""
    features: np.ndarray
    """(M, D) of them."""
    held_out: ImageCollection
    work: Path
    """Folder of the samples and the picture."""

    def frechet(self, judged: Judged) -> float:
        """Return the distance to all training images."""
        of_training = FeatureStatistics.of(self.features)
        return frechet_distance(FeatureStatistics.of(judged.features), of_training)


class Neighbours(NamedTuple):
    """The training image nearest to each of N images."""

    images: np.ndarray
    """(N, 32, 32, 3), mirrored where that is nearer."""
    distances: np.ndarray
    """(N,) root mean square of pixels, of 255."""


def train_classifier(folder: Path, out: Path, held_out: float, training: Training) -> None:
    images = judging.split(folder, held_out)
    pixels, labels = judging.load(images.training)
    about = About(images.training.class_names, WIDTHS, held_out, images.training.digest())
    start = time.perf_counter()
    model = judging.train(pixels, labels, about, training)
    seconds = time.perf_counter() - start
    real, classes = judging.load(images.validation)
    accuracy = share(model.judge(real).found == classes)
    model.about = dataclasses.replace(about, accuracy=accuracy)
    model.save(out)
    print(f"{accuracy:.1%} of {len(real):,} held-out images right after {seconds:.0f} s: {out}")


def set_up(folder: Path, model: str, classifier: Path, work: Path) -> Bench:
    """Load everything.

    Raises:
        FileNotFoundError: a part is missing.
        InputError: the parts do not fit together.
    """
    judge = Classifier.load(classifier)
    images = judging.split(folder, judge.about.held_out)
    if images.training.digest() != judge.about.trained_on:
        raise InputError(f"{classifier} was trained on other images than those in {folder}")
    pipe = Pipeline.from_pretrained(model)
    if pipe.labels is None:
        raise InputError(f"{model} is conditioned on text; give a class-conditional model")
    for name in judge.about.classes:
        pipe.labels.find(name)
    scale = pipe.tokenizer.config.downsampling
    height, width = (side * scale for side in pipe.transformer.config.grid)
    if (height, width) != (SIDE, SIDE):
        raise InputError(f"{model} draws {width}x{height} pixels, expected {SIDE}x{SIDE}")
    pixels, _ = judging.load(images.training)
    return Bench(pipe, judge, pixels, judge.judge(pixels).features, images.validation, work)


def generate(
    bench: Bench, count: int, seed: int, settings: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Samples (N, 32, 32, 3) of all classes in turn, and their classes (N,); resumable."""
    pipe, names = bench.pipe, bench.judge.about.classes
    assert pipe.labels is not None
    asked = np.arange(count) % len(names)
    prompts = [pipe.labels.find(names[label]) for label in asked]
    about = [pipe.transformer.fingerprint(), pipe.tokenizer.fingerprint(), pipe.precision]
    whole = json.dumps([*about, sampling_of(pipe, settings), count, seed])
    folder = bench.work / "samples" / hashlib.sha256(whole.encode()).hexdigest()[:16]
    plan = SamplePlan.of_prompts(pipe, prompts, seed=seed, **settings)
    return draw_samples(pipe, plan, folder).read(0, count), asked


def sampling_of(pipe: Pipeline, settings: dict[str, Any]) -> dict[str, Any]:
    return dataclasses.asdict(pipe.sampling.replace(**settings))


@torch.inference_mode()
def reconstructed(pipe: Pipeline, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 32, 32, 3) after the tokenizer, and their codes (N, rows, columns)."""
    tokenizer = pipe.tokenizer
    after: list[np.ndarray] = []
    codes: list[np.ndarray] = []
    for part in torch.from_numpy(images).movedim(-1, 1).split(_PART):
        found = tokenizer.encode(uint8_to_images(part.to(pipe.device)).to(tokenizer.dtype))
        decoded = images_to_uint8(tokenizer.decode(found).float())
        codes.append(found.cpu().numpy())
        after.append(decoded.movedim(1, -1).cpu().numpy())
    return np.concatenate(after), np.concatenate(codes)


def share(right: np.ndarray) -> float:
    return float(np.mean(right))


def by_class(right: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """The share of ``right`` (N,) in all and in each class."""
    each = {
        name: share(right[labels == label])
        for label, name in enumerate(names)
        if np.any(labels == label)
    }
    return {"all": share(right), **each}


def mirrored(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images[:, :, ::-1])


def rmse(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Root mean square of the differences of pairs (N, ...), (N,)."""
    squares = np.square(a.astype(np.float32) - b.astype(np.float32))
    result: np.ndarray = np.sqrt(squares.reshape(len(a), -1).mean(1))
    return result


def neighbours(images: np.ndarray, training: np.ndarray) -> Neighbours:
    """By pixels."""
    # Mirroring the samples instead of the training images gives the same distances.
    both = np.concatenate([images, mirrored(images)])
    rows = nearest(both.reshape(len(both), -1), training.reshape(len(training), -1))[:, 0]
    plain, flipped = np.split(rmse(both, training[rows]), 2)
    nearer = flipped < plain
    found = np.where(
        nearer[:, None, None, None],
        mirrored(training[rows[len(images) :]]),
        training[rows[: len(images)]],
    )
    return Neighbours(found, np.where(nearer, flipped, plain))


def copies(bench: Bench, samples: np.ndarray, held_out: np.ndarray) -> dict[str, Any]:
    """Share of near copies among samples, and among reconstructions of held-out images.

    Both are (N, 32, 32, 3). Two measures by pixels: below a threshold that most copies would be
    below, and about as near to the nearest training image as that image's own reconstruction, which
    is stricter with smooth pictures. Features do not help: a reconstruction's are farther from its
    image's than most images' from their nearest neighbours'.
    """
    originals = bench.training[evenly(len(bench.training), CALIBRATED_BY)]
    copied, _ = reconstructed(bench.pipe, originals)
    limit = float(np.percentile(rmse(originals, copied), PERCENTILE))
    results: dict[str, Any] = {"limit": limit}
    for name, images in (("samples", samples), ("held-out reconstructions", held_out)):
        near = neighbours(images, bench.training)
        own = rmse(near.images, reconstructed(bench.pipe, near.images)[0])
        results[name] = {
            "pixels": share(near.distances < limit),
            "as near as its reconstruction": share(near.distances <= SLACK * own),
            "median": float(np.median(near.distances)),
        }
        if images is samples:
            save_pairs(samples, near, bench.work / PAIRS_NAME)
    return results


def save_pairs(samples: np.ndarray, near: Neighbours, path: Path) -> None:
    """A sheet of samples, each beside the training image nearest to it, the nearest first."""
    order = near.distances.argsort(kind="stable")[:SHOWN]
    pairs = np.stack([samples[order], near.images[order]], axis=1)
    captions = [x for row in order for x in ("sample", f"{near.distances[row]:.1f} off")]
    pictures = arrays_to_pil(pairs.reshape(-1, *samples.shape[1:]))
    save_png(image_grid(pictures, columns=8, captions=captions, scale=3), path)


def measure(
    bench: Bench, count: int, seed: int, settings: dict[str, Any], out: Path | None
) -> None:
    pipe, judge = bench.pipe, bench.judge
    names = judge.about.classes
    samples, asked = generate(bench, count, seed, settings)
    real, labels = judging.load(bench.held_out.thinned(count))
    restored, codes = reconstructed(pipe, real)
    first = slice(JUDGED)
    sets = {
        "samples": (judge.judge(samples), asked, first),
        "held-out": (judge.judge(real), labels, slice(None)),
        "held-out reconstructions": (judge.judge(restored), labels, slice(None)),
    }
    used = np.bincount(codes.ravel(), minlength=pipe.tokenizer.config.codebook_size)
    results: dict[str, Any] = {
        **about(bench, seed),
        "sampling": sampling_of(pipe, settings),
        "samples": count,
        "held-out images": len(real),
        "recognised": {
            name: by_class((judged.found == wanted)[part], wanted[part], names)
            for name, (judged, wanted, part) in sets.items()
        },
        "frechet": {name: bench.frechet(judged) for name, (judged, _, _) in sets.items()},
        "copies": copies(bench, samples[first], restored[evenly(len(restored), JUDGED)]),
        "psnr": float(psnr(real, restored).mean()),
        "codebook": dict(zip(("usage", "perplexity"), codebook_use(used), strict=True)),
    }
    print_table(["measure", "value"], flattened(results))
    print(f"the nearest training images are in {bench.work / PAIRS_NAME}")
    keep("cifar10", results, out)


def sweep(
    bench: Bench,
    grid: Sequence[tuple[float, int, float]],
    count: int,
    seed: int,
    out: Path | None,
) -> None:
    """``grid``: temperature, top-k and guidance scale of each setting."""
    found = []
    for temperature, top_k, guidance in grid:
        settings = {"guidance_scale": guidance, "top_k": top_k, "temperature": temperature}
        samples, asked = generate(bench, count, seed, settings)
        judged = bench.judge.judge(samples)
        right = share(judged.found == asked)
        found.append({**settings, "recognised": right, "frechet": bench.frechet(judged)})
        print(json.dumps(found[-1]), flush=True)
    print_table(
        ["guidance", "top-k", "temperature", "recognised", "frechet"],
        [
            [
                f"{row['guidance_scale']:g}",
                str(row["top_k"] or "all"),
                f"{row['temperature']:g}",
                f"{row['recognised']:.1%}",
                f"{row['frechet']:.3f}",
            ]
            for row in found
        ],
    )
    keep("cifar10-sweep", {**about(bench, seed), "samples": count, "settings": found}, out)


def about(bench: Bench, seed: int) -> dict[str, Any]:
    """Model and judge, for the record."""
    judge = bench.judge.about
    return {
        "model": bench.pipe.name,
        **bench.pipe.precision,
        "seed": seed,
        "classifier": {"accuracy": judge.accuracy, "trained on": judge.trained_on},
        "training images": len(bench.training),
    }


def flattened(values: dict[str, Any], above: str = "") -> list[list[str]]:
    """Rows of name and value."""
    rows: list[list[str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += flattened(value, f"{above}{name}, ")
        else:
            rows.append([above + name, f"{value:.4g}" if isinstance(value, float) else str(value)])
    return rows


def keep(name: str, results: dict[str, Any], out: Path | None) -> None:
    if out is None:
        record(name, results)
    else:
        write_json(out, {"machine": machine(), "results": results})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    training = actions.add_parser("train-classifier")
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--held-out", type=float, default=HELD_OUT)
    training.add_argument("--epochs", type=int, default=Training.epochs)
    training.add_argument("--seed", type=int, default=Training.seed)
    measuring, sweeping = actions.add_parser("measure"), actions.add_parser("sweep")
    for each, count in ((measuring, 5000), (sweeping, 2000)):
        each.add_argument("--model", required=True)
        each.add_argument("--classifier", type=Path, required=True)
        each.add_argument("--samples", type=int, default=count)
        each.add_argument("--seed", type=int, default=0)
        each.add_argument("--work", type=Path, default=Path("runs/cifar10-measured"))
        each.add_argument("--out", type=Path, help="JSON; by default in benchmarks/results")
    measuring.add_argument("--guidance", type=float)
    measuring.add_argument("--top-k", type=int)
    measuring.add_argument("--temperature", type=float)
    sweeping.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 4.0])
    sweeping.add_argument("--top-k", type=int, nargs="+", default=[0, 256])
    sweeping.add_argument("--temperature", type=float, nargs="+", default=[1.0])
    for each in (training, measuring, sweeping):
        each.add_argument("data", type=Path, help="folder of class folders")
    try:
        run(parser.parse_args())
    except (InputError, FileNotFoundError) as error:
        parser.error(str(error))


def run(arguments: argparse.Namespace) -> None:
    if arguments.action == "train-classifier":
        how = Training(epochs=arguments.epochs, seed=arguments.seed)
        train_classifier(arguments.data, arguments.out, arguments.held_out, how)
        return
    if arguments.samples < 2:
        raise InputError(f"--samples is {arguments.samples}, expected at least 2")
    bench = set_up(arguments.data, arguments.model, arguments.classifier, arguments.work)
    if arguments.action == "sweep":
        grid = list(itertools.product(arguments.temperature, arguments.top_k, arguments.guidance))
        sweep(bench, grid, arguments.samples, arguments.seed, arguments.out)
        return
    given = {
        "guidance_scale": arguments.guidance,
        "top_k": arguments.top_k,
        "temperature": arguments.temperature,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    measure(bench, arguments.samples, arguments.seed, settings, arguments.out)


if __name__ == "__main__":
    main()
