"""What the evaluate commands share: the network, the folder, the report."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from llamagen.cli.options import DeviceOptions, QuantizationOptions, setting_options
from llamagen.data.columns import SourceConfig
from llamagen.support.errors import InputError

if TYPE_CHECKING:
    import torch

    from llamagen.evaluation.features import FeatureNetwork
    from llamagen.evaluation.image_sets import ImageSet
    from llamagen.evaluation.report import Report
    from llamagen.pipeline import Pipeline

    class ClassSettings:
        """An option for each field of ``SamplingConfig``."""

    class SweepSettings:
        """As ``ClassSettings``, without those of which a sweep tries several values."""
else:
    _DEFAULT = "the paper's for published models, else the model's own"
    ClassSettings = setting_options(default=_DEFAULT)
    SweepSettings = setting_options(default=_DEFAULT, without=("guidance_scale", "top_k"))


_CLASSIFIER_FOLDER = "classifier"


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
    """Folder of the classifier. Default: "classifier" in the output folder; trained if it is not
    there."""
    classifier_steps: int = 2000
    """Training steps of the classifier, of 128 images each."""
    classifier_flip: bool = False
    """Whether mirror images keep their class."""

    def open(self, out: Path, reference: ImageSet | None, device: torch.device) -> FeatureNetwork:
        """Finds, downloads or trains the network; to be called in every process."""
        from llamagen.evaluation.networks import InceptionV3
        from llamagen.evaluation.networks.train_classifier import (
            ClassifierTraining,
            open_classifier,
        )
        from llamagen.support import distributed

        if self.network == "inception":
            try:
                with distributed.main_first():
                    return InceptionV3.from_weights(self.inception, device=device)
            except InputError as error:
                raise InputError(
                    f"{error}; or compare in a classifier's features with --network classifier"
                ) from error
        if self.classifier_steps < 1:
            raise InputError(f"--classifier-steps is {self.classifier_steps}, expected at least 1")
        training = ClassifierTraining(steps=self.classifier_steps, flip=self.classifier_flip)
        return open_classifier(
            self.classifier or out / _CLASSIFIER_FOLDER, reference, device, training
        )


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
    """What stands between several captions in one value, as "|"."""

    def config(self) -> SourceConfig:
        """As ``open_images`` takes it."""
        return SourceConfig(**dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions(QuantizationOptions, DeviceOptions):
    """Where the report goes, and how images of a data set are found."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("evaluation")
    """Folder for report.json, report.html, and all that was drawn and computed: the same command
    goes on where it stopped, and under torchrun the processes share the work."""
    source: ImageSourceOptions = dataclasses.field(default_factory=ImageSourceOptions)

    @contextlib.contextmanager
    def processes(self) -> Iterator[torch.device]:
        """Joins the processes of torchrun, if there are any; yields this one's device."""
        import llamagen.support.storage as storage
        from llamagen.evaluation.page import require_page_packages
        from llamagen.support import distributed

        require_page_packages()
        storage.require_writable(self.out)
        device, _ = self.resolve()
        with distributed.process_group(str(device.type)) as own:
            yield own

    def load(self, model: str | None, device: torch.device) -> Pipeline:
        """The pipeline, once in the main process and then in the others."""
        if model is None:
            raise InputError("no model was named; give --model")
        from llamagen.pipeline import Pipeline
        from llamagen.support import distributed

        with distributed.main_first():
            pipeline = Pipeline.from_pretrained(
                model, device=device, dtype=None if self.dtype == "auto" else self.dtype
            )
            self.quantize(pipeline)
            return pipeline

    def finish(self, report: Report) -> None:
        """Writes and prints the report, in the main process."""
        from llamagen.evaluation.page import PAGE_NAME, save_report
        from llamagen.support import distributed

        if not distributed.is_main():
            return
        save_report(report, self.out)
        print(report.title)
        width = max(map(len, report.metrics), default=0)
        for name, value in report.metrics.items():
            print(f"  {name:<{width}}  {value:.6g}")
        for warning in report.warnings:
            print(f"note: {warning}")
        print(self.out / PAGE_NAME)
