"""Train both models on a folder of images with a subfolder for each class, and generate some.

    python examples/train_on_your_folder.py                    (--quick: a few steps)
    python examples/train_on_your_folder.py --data images/ --size 64 --out runs/mine

Without --data, the images are scikit-learn's handwritten digits, which take a few minutes on two
CPU cores; the models are too small for photographs. Needs the extra "demo-train" (matplotlib,
scikit-learn). The cells can be pasted into a notebook. The same from the shell: docs/training.md.
"""

# %% Sizes to change
import argparse
import dataclasses
import json
import sys
from pathlib import Path

from PIL import Image

from llamagen import Pipeline, SamplingConfig, TokenizerConfig, TransformerConfig
from llamagen.support.pictures import image_grid, save_png, stacked, titled
from llamagen.training import (
    LoopConfig,
    TokenizerTraining,
    TransformerTraining,
    train_tokenizer,
    train_transformer,
)
from llamagen.training.config import AugmentationConfig, ImageConfig

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--data", type=Path, help="folder of class folders; default: digits")
parser.add_argument("--size", type=int, default=32, help="pixels a side, a multiple of 8")
parser.add_argument("--out", type=Path, help="default: runs/train-on-your-folder[-quick]")
parser.add_argument("--quick", action="store_true", help="a few steps of each")
# A notebook has a command line of its own.
args = parser.parse_args([] if "ipykernel" in sys.modules else None)
# A run only resumes with the same recipe, so --quick has its own folder.
OUT = args.out or Path("runs", "train-on-your-folder" + ("-quick" if args.quick else ""))

IMAGES = ImageConfig(
    size=args.size,
    validation_fraction=0.1,  # held out for validation
)
TOKENIZER = TokenizerConfig(
    codebook_size=128,  # more for varied images: 1024 for CIFAR-10, 16384 as published
    base_channels=16,  # 128 as published
    # Each level but the last halves the image: 32 pixels become 4x4 codes. More codes give more
    # detail, but take a larger transformer.
    channel_multipliers=(1, 2, 4, 4),
    encoder_blocks=1,
    decoder_blocks=1,
    z_channels=64,
    norm_groups=4,
)
TRANSFORMER = TransformerConfig(
    dim=128,  # 256 and 6 layers for CIFAR-10; preset B has 768, 12 layers and 12 heads
    layers=4,
    heads=4,
    token_dropout=0.0,  # the defaults of 0.1 are for large models with few images
    residual_dropout=0.0,
    ffn_dropout=0.0,
)
TOKENIZER_STEPS, TRANSFORMER_STEPS = (4, 4) if args.quick else (500, 1400)


# %% The folder: OUT/digits/0/0000.png, ...
def write_digits(folder: Path, count: int) -> Path:
    """Write the first of scikit-learn's digits as a folder of class folders."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    for index, (scan, label) in enumerate(zip(scans.images[:count], scans.target, strict=False)):
        path = folder / str(label) / f"{index:04d}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((scan * 255 / 16).astype("uint8")).save(path)
    return folder


data = args.data or write_digits(OUT / "digits", count=100 if args.quick else 1797)
# Digits must not be mirrored.
mirrored = args.data is not None


# %% The image tokenizer: images to codes and back. It needs no classes.
LOOP = LoopConfig(
    batch_size=32,
    lr=2e-3,  # high, for a small model; 1e-4 as published
    # With "constant" instead, a finished run can be extended by raising the number of steps.
    schedule="cosine",
    warmup_steps=20,
    log_every=2 if args.quick else 25,
    validate_every=100,
    sample_every=250,
    save_every=250,  # steps lost at most if the process is killed
)
# `llamagen train tokenizer --help` lists all fields and their defaults.
tokenizer_recipe = TokenizerTraining(
    data=str(data),
    out=OUT / "tokenizer",
    images=IMAGES,
    augmentation=AugmentationConfig(crop_scale=1.1, flip=mirrored),
    model=TOKENIZER,
    codebook_init="data",  # a random one leaves most codes unused in a short training
    loop=dataclasses.replace(LOOP, steps=TOKENIZER_STEPS),
)
tokenizer = train_tokenizer(tokenizer_recipe)
print(f"tokenizer: validation PSNR {tokenizer.validation['psnr']:.1f} dB, {tokenizer.model}")

# %% The transformer: predicts the codes of a class. They are extracted first, and kept.
transformer_recipe = TransformerTraining(
    data=str(data),
    tokenizer=str(tokenizer.model),
    out=OUT / "transformer",
    images=IMAGES,
    # Views of each image: five shifted crops, or ten with their mirror images.
    views="ten-crop" if mirrored else "five-crop",
    model=TRANSFORMER,
    sampling=SamplingConfig(guidance_scale=2.0, top_p=0.9),  # saved with the model
    loop=dataclasses.replace(
        LOOP, steps=TRANSFORMER_STEPS, batch_size=64, lr=3e-3, weight_decay=0.05
    ),
)
transformer = train_transformer(transformer_recipe)
print(f"transformer: validation {transformer.validation['bits_per_code']:.2f} bits per code")

# %% Resuming. Ctrl-C saves a checkpoint and raises TrainingInterrupted. The same call resumes from
# the last checkpoint, so this script can simply be run again. A finished run is returned at once;
# another recipe is refused, with the names of the fields that differ.
again = train_transformer(transformer_recipe)
assert again.validation == transformer.validation

# %% Curves: each run plots those of its metrics.jsonl.
for run in (tokenizer, transformer):
    lines = (run.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [
        (line["step"], line["loss"]) for line in map(json.loads, lines) if line["split"] == "train"
    ]
    print(f"{run.out / 'curves.png'}: loss {losses[0][1]:.3f} at step {losses[0][0]}, then")
    print("  " + ", ".join(f"{loss:.3f} at {step}" for step, loss in losses[1:][-3:]))

# %% Samples: transformer.model is a pipeline folder, also for `llamagen generate --model`.
pipe = Pipeline.from_pretrained(transformer.model)
assert pipe.labels is not None
names = list(pipe.labels.names)[:10]
output = pipe(names, num_images_per_prompt=8, seed=0)
rows = [
    image_grid(output.images[8 * index : 8 * index + 8], columns=8, captions=[name] * 8, scale=2)
    for index, name in enumerate(names)
]
sheet = titled(stacked(rows, gap=0), f"random samples after {transformer.steps} steps")
save_png(sheet, OUT / "samples.png")
save_png(output.images[0], OUT / f"{names[0]}.png", metadata=output.metadata[0])
print(f"{OUT / 'samples.png'} has {len(output.images)} images of {transformer.model}")
