"""The evaluate commands: each compares images or measures a model, and writes a report."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from llamagen.cli.options import (
    DeviceOptions,
    QuantizationOptions,
    given_settings,
    require_at_least,
    setting_options,
)
from llamagen.data.columns import SourceConfig
from llamagen.support.errors import InputError

if TYPE_CHECKING:
    import torch

    from llamagen.evaluation.features import ReferenceSource
    from llamagen.evaluation.image_sets import ImageSet
    from llamagen.evaluation.networks.lpips import Lpips
    from llamagen.evaluation.protocols.common import Workplace
    from llamagen.evaluation.report import Report
    from llamagen.pipeline import Pipeline

_PAPERS = "the paper's for published models, else the model's own"

_MODEL = {"model": "no model was named; give --model"}
_IMAGES = {"images": "no images were named; give a folder"}
_REFERENCE = {"reference": "no reference was named; give --reference an .npz file or images"}

Count = Annotated[int, tyro.conf.arg(name="num-images", aliases=["-n"])]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """In whose features images are compared."""

    network: Literal["inception", "classifier"] = "inception"
    """Inception-v3, as published; or a small classifier that is trained on the reference's classes,
    for data that Inception does not suit and machines that do not have it."""
    inception: str | None = None
    """Inception's weights (pt_inception-2015-12-05-6726825d.pth): a file, an address, or a file on
    the hub. Default: downloaded once."""
    classifier: Path | None = None
    """Folder of the classifier, trained if it is empty. Default: "classifier" below --out."""
    classifier_steps: int = 2000
    """Training steps of the classifier, of 128 images each."""
    classifier_flip: bool = False
    """Whether mirror images keep their class."""

    def check(self) -> None:
        """Raise InputError if an option is given that the network does not use."""
        for name, default in dataclasses.asdict(NetworkOptions()).items():
            its = "inception" if name == "inception" else "classifier"
            if getattr(self, name) != default and self.network != its and name != "network":
                raise InputError(f"`{name}` goes with --network {its}")

    def place(self, out: Path, reference: ReferenceSource, device: torch.device) -> Workplace:
        """Load, download or train the network, in every process; return it with results' folder."""
        from llamagen.evaluation.networks.classifier import ClassifierTraining, open_classifier
        from llamagen.evaluation.networks.inception import InceptionV3
        from llamagen.evaluation.protocols.common import Workplace
        from llamagen.support import distributed

        if self.network == "classifier":
            require_at_least(1, self, "classifier_steps")
            training = ClassifierTraining(steps=self.classifier_steps, flip=self.classifier_flip)
            folder = self.classifier or out / "classifier"
            if folder.resolve() == out.resolve():
                raise InputError("--classifier is the folder of the results; name one of its own")
            shared = self.classifier is not None
            network = open_classifier(folder, reference.images, device, training, shared=shared)
            return Workplace(out=out, network=network, device=device)
        try:
            with distributed.main_first():
                inception = InceptionV3.from_weights(self.inception, device=device)
                return Workplace(out=out, network=inception, device=device)
        except InputError as error:
            other = "or compare in a classifier's features with --network classifier"
            raise InputError(f"{error}; {other}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSourceOptions:
    """Where images are in a data set that is more than a folder."""

    split: str = "train"
    """Split of a hub data set, or of a folder with Parquet or tar files."""
    image_column: str | None = None
    """Column of the image, or of its file's name. Default: the column of images there is."""
    label_column: str | None = None
    """Column of the class. Default: label, class or cls if there is one."""
    caption_columns: tuple[str, ...] = ()
    """Columns of captions. Default: text, caption or txt if there is one."""
    caption_separator: str | None = None
    """Separator of several captions in one value, as "|"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions(QuantizationOptions, DeviceOptions, abc.ABC):
    """Where the report goes, and how images of a data set are found."""

    needs: ClassVar[dict[str, str]] = {}
    """Options that must be given -> the error without them."""
    min_count: ClassVar[int] = 1

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("evaluation")
    """Folder for report.json, report.html, and all that was generated and computed: the same
    command resumes where it stopped, and under torchrun the processes share the work."""
    source: ImageSourceOptions = dataclasses.field(default_factory=ImageSourceOptions)

    @abc.abstractmethod
    def _evaluate(self, device: torch.device) -> Report:
        """Compute the report; called in every process of a run."""

    def _load(self, model: str | None, device: torch.device) -> Pipeline:
        """Return the pipeline, loaded in the main process first."""
        from llamagen.pipeline import Pipeline
        from llamagen.support import distributed

        assert model is not None
        dtype = None if self.dtype == "auto" else self.dtype
        with distributed.main_first():
            pipeline = Pipeline.from_pretrained(model, device=device, dtype=dtype)
            self.quantize(pipeline)
            return pipeline

    def _find(self, source: str | None, size: int | None) -> ReferenceSource:
        """Return images or statistics that an option names."""
        from llamagen.evaluation.features import ReferenceSource

        assert source is not None
        return ReferenceSource(source, SourceConfig(**vars(self.source)), size=size)

    def _find_images(self, source: str | None, size: int | None) -> ImageSet:
        """Return images that an option names, which may not be statistics."""
        found = self._find(source, size)
        if found.images is None or found.archive is not None:
            raise InputError(f"{source} holds statistics; give the images themselves")
        return found.images


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions(EvaluationOptions):
    """Which images are generated, and what they are compared with."""

    min_count = 2

    model: str | None = None
    """Name (c2i-L-384, t2i-XL-256), pipeline folder or hub repository."""
    reference: str | None = None
    """Images or ADM's .npz file to compare with: class folders, or whatever training takes."""
    size: int | None = None
    """Side in pixels at which images are compared. Default: 256 for published models, as
    published; for others the size of their images."""
    seed: int = 0
    """Of the first sample, and of the classes' order; the next samples get the next numbers."""
    batch_size: int | None = None
    """Images generated at once. Default: as many as fit into memory."""
    compare: NetworkOptions = dataclasses.field(default_factory=NetworkOptions)

    def _place(self, pipeline: Pipeline, device: torch.device) -> tuple[ReferenceSource, Workplace]:
        """Return the reference, at the size at which samples are compared, and the network."""
        from llamagen.evaluation.samples import compared_side

        reference = self._find(self.reference, compared_side(pipeline, self.size))
        return reference, self.compare.place(self.out, reference, device)

    def _plan(self) -> dict[str, Any]:
        """Return arguments of a ``SamplePlan``."""
        from llamagen.generation.request import check_seed

        return {"seed": check_seed(self.seed), "size": self.size, **given_settings(self)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassOptions(SampleOptions):
    """Which classes are generated."""

    needs = _REFERENCE | _MODEL

    count: Count = 50_000
    """Samples, of each setting."""
    classes: Literal["balanced", "random"] = "balanced"
    """All classes equally often, in random order; or the class of each sampled at random."""

    def _compare(
        self, protocol: Callable[..., Report], device: torch.device, **options: Any
    ) -> Report:
        """Call ``evaluate_classes`` or ``evaluate_sweep`` with ``options`` of its own."""
        from llamagen.evaluation.samples import SamplePlan

        pipeline = self._load(self.model, device)
        if pipeline.labels is None:
            raise InputError(f"{pipeline.name} draws texts, not classes; use evaluate t2i")
        plan = SamplePlan.of_classes(pipeline, self.count, order=self.classes, **self._plan())
        reference, place = self._place(pipeline, device)
        return protocol(pipeline, plan, reference, place, batch_size=self.batch_size, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classes(setting_options(_PAPERS), ClassOptions):  # type: ignore[misc]
    """Generate images of all classes and compare them with a reference: FID and its relatives.

    The published protocol: 50,000 samples, all classes equally often, compared at 256x256 with
    ADM's VIRTUAL_imagenet256_labeled.npz in Inception's features.
    """

    npz: Path | None = None
    """Also write the samples as ADM's evaluator takes them."""

    def _evaluate(self, device: torch.device) -> Report:
        from llamagen.evaluation.protocols.comparison import evaluate_classes

        return self._compare(evaluate_classes, device, npz=self.npz)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(
    setting_options(_PAPERS, without=("guidance_scale", "top_k")),  # type: ignore[misc]
    ClassOptions,
):
    """Generate and compare at many sampling settings: which guidance scale and top-k are best."""

    needs = ClassOptions.needs | dict.fromkeys(
        ("guidance_scales", "top_ks"),
        "there are no settings to try; give --guidance-scales and --top-ks",
    )

    count: Count = 5_000
    """Samples of each setting."""
    guidance_scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0)
    """Guidance scales to try."""
    top_ks: tuple[int, ...] = (0,)
    """Top-ks to try with each; 0 means all."""

    def _evaluate(self, device: torch.device) -> Report:
        from llamagen.evaluation.protocols.comparison import evaluate_sweep

        settings = {"guidance_scales": self.guidance_scales, "top_ks": self.top_ks}
        return self._compare(evaluate_sweep, device, **settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts(setting_options(), SampleOptions):  # type: ignore[misc]
    """Generate an image of each caption and compare: FID and CLIP score.

    The published protocol: 30,000 captions of COCO's val2014, FID at 256x256 against their images,
    and the CLIP score of ViT-B/32.
    """

    needs = {"prompts_file": "no captions were named; give --prompts-file"} | _MODEL
    min_count = 1

    prompts_file: Path | None = None
    """Captions (.txt, .csv, .tsv, .jsonl, .json, as those of COCO and PartiPrompts)."""
    prompt_column: str | None = None
    """Column of the captions in that file. Default: prompt, text or caption."""
    count: Count = 30_000
    """Maximum number of captions, taken evenly from the whole file."""
    reference: str | None = None
    """The captions' own images, or their .npz file; without it the FID is left out."""
    clip: str | None = "openai/clip-vit-base-patch32"
    """CLIP model for the CLIP score: hub repository or folder; "none" leaves it out."""

    def _evaluate(self, device: torch.device) -> Report:
        from llamagen.data.sources import read_prompts
        from llamagen.evaluation.networks.clip import ClipEncoder
        from llamagen.evaluation.protocols.comparison import evaluate_texts
        from llamagen.evaluation.samples import SamplePlan
        from llamagen.support import distributed

        without_clip = self.clip is None or self.clip.lower() == "none"
        if self.reference is None and without_clip:
            raise InputError("there is nothing to measure; give --reference or --clip")
        assert self.prompts_file is not None
        texts = [text for text, _ in read_prompts(self.prompts_file, column=self.prompt_column)]
        count = min(self.count, len(texts))
        chosen = [texts[index * len(texts) // count] for index in range(count)]
        pipeline = self._load(self.model, device)
        if pipeline.labels is not None:
            raise InputError(f"{pipeline.name} draws classes, not texts; use evaluate c2i")
        plan = SamplePlan.of_prompts(pipeline, chosen, **self._plan())
        clip = reference = place = None
        if not without_clip:
            with distributed.main_first():
                clip = ClipEncoder.from_pretrained(str(self.clip), device=device)
        if self.reference is not None:
            reference, place = self._place(pipeline, device)
        return evaluate_texts(
            pipeline, plan, self.out, place, reference, clip, batch_size=self.batch_size
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer(EvaluationOptions):
    """Send images through an image tokenizer and compare them with themselves: rFID, PSNR, SSIM.

    The published protocol: ImageNet's 50,000 validation images, cropped to 256x256, against the
    very same images; at 384 and 512 reconstructions are resized to 256 before they are compared.
    """

    needs = _IMAGES

    images: tyro.conf.Positional[str | None] = None
    """Images: a folder, an .npz file, or any other source that training takes."""
    tokenizer: Annotated[str, tyro.conf.arg(aliases=["-t"])] = "vq-16"
    """Name (vq-16, vq-8), folder, checkpoint file or hub repository."""
    size: int | None = None
    """Side in pixels that the middle square of each image is cropped to. Default: 256 for the
    published tokenizers, as published; for others images are taken as they are."""
    reference: str | None = None
    """Compare with this for rFID instead of the images themselves: not as published."""
    rfid: bool = True
    """Compare in a network's features."""
    lpips: Literal["auto", "yes", "no"] = "auto"
    """Measure LPIPS too; auto does where its weights are on this machine."""
    lpips_weights: Path | None = None
    """File or folder of LPIPS's weights. Default: the cache, or a download with --lpips yes."""
    compare: NetworkOptions = dataclasses.field(default_factory=NetworkOptions)

    def _evaluate(self, device: torch.device) -> Report:
        from llamagen.checkpoints import load_tokenizer
        from llamagen.checkpoints.names import find_public
        from llamagen.evaluation.protocols.tokenizer import Reconstructions, evaluate_tokenizer
        from llamagen.evaluation.samples import SIZE
        from llamagen.support import distributed

        # float32 unless asked otherwise: this command measures the tokenizer, not the precision.
        _, dtype = self.resolve(auto="float32")
        size = self.size or (SIZE if find_public(self.tokenizer) else None)
        images = self._find_images(self.images, size)
        with distributed.main_first():
            tokenizer = load_tokenizer(self.tokenizer, device=device, dtype=dtype)
        compared = SIZE if size is not None and size > SIZE else None
        reference = self._find(self.reference or self.images, compared or size)
        folder = self.out / "reconstructions"
        made = Reconstructions(tokenizer, images, folder, compared_size=compared)
        place = self.compare.place(self.out, reference, device) if self.rfid else None
        perceptual = self._perceptual(device)
        return evaluate_tokenizer(self.tokenizer, made, reference, place, perceptual=perceptual)

    def _perceptual(self, device: torch.device) -> Lpips | None:
        """LPIPS, if it is wanted and there."""
        from llamagen.evaluation.networks.lpips import FILE_NAME, load_lpips
        from llamagen.support import distributed
        from llamagen.support.storage import cache_folder

        here = self.lpips_weights is not None or (cache_folder() / FILE_NAME).is_file()
        if self.lpips == "no" or (self.lpips == "auto" and not here):
            return None
        with distributed.main_first():
            return load_lpips(self.lpips_weights).to(device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder(EvaluationOptions):
    """Compare any images with any others: FID and its relatives."""

    needs = dict.fromkeys(
        ("images", "reference"), "two sets of images are needed: llamagen evaluate folder A B"
    )

    images: tyro.conf.Positional[str | None] = None
    """Images to evaluate: a folder, an .npz file, or any other source that training takes."""
    reference: tyro.conf.Positional[str | None] = None
    """Reference of the comparison: likewise, or an .npz file of ADM's statistics."""
    size: int | None = None
    """Side in pixels that the middle square of each image is cropped to. Default: images are taken
    as they are, and must have one size."""
    save_reference: Path | None = None
    """Also write the reference's statistics, as ADM's evaluator reads them."""
    compare: NetworkOptions = dataclasses.field(default_factory=NetworkOptions)

    def _evaluate(self, device: torch.device) -> Report:
        from llamagen.evaluation.protocols.comparison import evaluate_folder

        images = self._find_images(self.images, self.size)
        reference = self._find(self.reference, self.size)
        place = self.compare.place(self.out, reference, device)
        return evaluate_folder(images, reference, place, save_reference=self.save_reference)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Likelihood(EvaluationOptions):
    """Measure how likely a model finds held-out images: bits per code, per pixel, by place."""

    needs = _IMAGES | _MODEL

    images: tyro.conf.Positional[str | None] = None
    """Images, not trained on, with the model's classes or captions: whatever training takes."""
    model: str | None = None
    """Name, pipeline folder or hub repository."""

    def _evaluate(self, device: torch.device) -> Report:
        from llamagen.evaluation.protocols.likelihood import evaluate_likelihood
        from llamagen.evaluation.samples import model_size

        pipeline = self._load(self.model, device)
        height, width = model_size(pipeline)
        images = self._find_images(self.images, height if height == width else None)
        return evaluate_likelihood(pipeline, images, self.out)


def run(options: EvaluationOptions) -> None:
    """Evaluate in all processes of torchrun; write and print the report in the main one."""
    for name, message in options.needs.items():
        if not getattr(options, name):
            raise InputError(message)
    require_at_least(options.min_count, options, "count")
    require_at_least(1, options, "size", "batch_size")
    if compare := getattr(options, "compare", None):
        compare.check()
    from llamagen.evaluation.report import PAGE_NAME, require_page_packages, save_report
    from llamagen.support import distributed, storage
    from llamagen.support.locks import folder_lock

    require_page_packages()
    storage.require_writable(options.out)
    device, _ = options.resolve()
    with (
        distributed.process_group(str(device.type)) as own,
        folder_lock(options.out, distributed.rank(), distributed.world_size()),
    ):
        report = options._evaluate(own)
        if not distributed.is_main():
            return
        save_report(report, options.out)
    print(report.title)
    width = max(map(len, report.metrics), default=0)
    for name, value in report.metrics.items():
        print(f"  {name:<{width}}  {value:.6g}")
    for warning in report.warnings:
        print(f"note: {warning}")
    print(options.out / PAGE_NAME)
