"""CONTRIBUTING.md's recipes are true: each is followed with a toy, in a copy of the package.

A toy changes exactly the files that its recipe names. Then a process of its own, which imports the
copy, runs the recipe's ``check_...`` function below.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import llamagen
from tests import forked

ROOT = Path(__file__).parent.parent
PACKAGE = Path(llamagen.__file__).parent


class Copy:
    """A copy of the package that is edited as a contributor would edit it."""

    def __init__(self, folder: Path) -> None:
        self.package = folder / "llamagen"
        self.changed: set[str] = set()
        shutil.copytree(
            PACKAGE, self.package, ignore=shutil.ignore_patterns("__pycache__", "assets")
        )
        (self.package / "assets").symlink_to(PACKAGE / "assets")

    def add(self, name: str, text: str) -> None:
        """Add a file."""
        path = self.package / name
        assert not path.exists()
        path.write_text(text)
        self.changed.add(name)

    def insert(self, name: str, before: str, text: str) -> None:
        """Insert lines before the one line that begins with ``before``."""
        path = self.package / name
        lines = path.read_text().splitlines(keepends=True)
        (index,) = [i for i, line in enumerate(lines) if line.startswith(before)]
        path.write_text("".join([*lines[:index], text, *lines[index:]]))
        self.changed.add(name)

    def replace(self, name: str, old: str, new: str) -> None:
        """Replace a text that occurs once."""
        path = self.package / name
        text = path.read_text()
        assert text.count(old) == 1, (name, old)
        path.write_text(text.replace(old, new))
        self.changed.add(name)

    def check(self, function: str) -> None:
        """Run a function of this module where the copy is imported as ``llamagen``."""
        folder = self.package.parent
        process = forked.start(__name__, function, log=folder / "log", path=folder)
        process.join()
        assert process.exitcode == 0, (folder / "log.err").read_text()


@pytest.fixture
def copy(tmp_path) -> Copy:
    return Copy(tmp_path)


def files_named(heading: str) -> set[str]:
    """Files that a recipe tells to change: those it names, parentheses aside. NAME is the toy's."""
    (section,) = re.findall(
        rf"^### {heading}\n(.*?)(?=^##|\Z)", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S
    )
    return {
        name.replace("NAME", "toy")
        for name in re.findall(r"`([\w/]+\.py)`", re.sub(r"\([^)]*\)", "", section))
        if not name.startswith("tests/")
    }


def codes(model, sampling=None, **settings) -> list[int]:
    """Codes that our own engine generates of one class."""
    import torch

    from llamagen.config import SamplingConfig
    from llamagen.generation import GenerationRequest, NativeEngine

    request = GenerationRequest(
        condition=torch.tensor(1), seed=0, sampling=sampling or SamplingConfig(), **settings
    )
    return NativeEngine(model).generate([request]).flatten().tolist()


def test_add_a_sampling_setting(copy):
    copy.replace(
        "config.py",
        "    min_p: float = _setting(\n",
        '    toy_even: float = _setting(0.0, "Logits of odd codes are lowered by it.", minimum=0)\n'
        "    min_p: float = _setting(\n",
    )
    copy.insert(
        "generation/sampling.py",
        before="def sample_from(",
        text="def apply_toy(logits, penalty):\n"
        "    logits = logits.clone()\n"
        "    logits[:, 1::2] -= penalty\n"
        "    return logits\n\n\n",
    )
    copy.replace(
        "generation/sampling.py", "    min_p: Value\n", "    min_p: Value\n    toy_even: Value\n"
    )
    copy.replace(
        "generation/sampling.py",
        "            min_p=_column([row.min_p for row in rows], device),\n",
        "            min_p=_column([row.min_p for row in rows], device),\n"
        "            toy_even=_column([row.toy_even for row in rows], device),\n",
    )
    copy.insert(
        "generation/sampling.py",
        before="        logits = apply_top_k(logits, self.top_k)",
        text="        logits = apply_toy(logits, self.toy_even)\n",
    )
    assert copy.changed == files_named("A sampling setting or filter")
    copy.check("check_sampling_setting")


def check_sampling_setting() -> None:
    import torch

    from llamagen.backends.cpu.sampling import CpuSampler
    from llamagen.config import SamplingConfig
    from tests.tiny_models import tiny_pipeline

    plain, toy = SamplingConfig(), SamplingConfig(toy_even=1e9)
    pipe = tiny_pipeline()
    assert any(code % 2 for code in codes(pipe.transformer, plain))
    assert not any(code % 2 for code in codes(pipe.transformer, toy))
    # Fast paths step aside only where it is used.
    cpu = torch.device("cpu")
    assert not CpuSampler.supports([plain, toy], 64, cpu)
    # What users meet: see test_declared_settings.py.
    assert pipe("dog", toy_even=1e9).metadata[0]["toy_even"] == 1e9


def test_add_a_quantizer(copy):
    copy.add(
        "models/tokenizer/quantizers/toy.py",
        "import torch\n\n"
        "from llamagen.models.tokenizer.quantizers import Quantized, Quantizer\n\n\n"
        "class ToyQuantizer(Quantizer):\n"
        '    """The signs of latents are the bits of their codes (2310.05737)."""\n\n'
        "    def __init__(self, config):\n"
        "        super().__init__()\n"
        "        self.dim = config.codebook_dim\n"
        "        assert config.codebook_size == 2**self.dim\n\n"
        "    def compared(self, latents):\n"
        "        return latents.float()\n\n"
        "    def forward(self, latents):\n"
        "        latents = self.compared(latents)\n"
        "        bits = (latents > 0).long()\n"
        "        codes = sum(bits[:, i] << i for i in range(self.dim))\n"
        "        return Quantized(2.0 * bits - 1.0, latents, codes)\n\n"
        "    def lookup(self, codes):\n"
        "        bits = [(codes >> i) & 1 for i in range(self.dim)]\n"
        "        return 2.0 * torch.stack(bits, dim=1).float() - 1.0\n\n"
        "    def losses(self, quantized, *, entropy=False):\n"
        "        vectors, latents, _ = quantized\n"
        '        return {"commitment": (latents - vectors.detach()).square().mean()}\n',
    )
    copy.replace(
        "config.py", '{"vq": "VectorQuantizer"}', '{"vq": "VectorQuantizer", "toy": "ToyQuantizer"}'
    )
    assert copy.changed == files_named("A quantiser")
    copy.check("check_quantizer")


def check_quantizer() -> None:
    import tempfile

    import torch

    from llamagen.models.tokenizer import ImageTokenizer
    from llamagen.training.config import TokenizerLossConfig
    from llamagen.training.losses import tokenizer_terms, total_loss
    from tests.tiny_models import tiny_tokenizer

    toy = tiny_tokenizer(quantizer="toy", codebook_dim=6)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    output = toy(images)
    terms = tokenizer_terms(output, images, toy.quantize, TokenizerLossConfig(entropy_weight=0.1))
    assert list(terms) == ["reconstruction", "commitment"]
    total_loss(terms).backward()
    codes = toy.encode(images)
    assert torch.equal(codes, output.quantized.codes)
    assert torch.equal(toy.quantize.lookup(codes), output.quantized.vectors)
    with tempfile.TemporaryDirectory() as folder:
        toy.save_pretrained(folder)
        assert torch.equal(ImageTokenizer.from_pretrained(folder).encode(images), codes)


def test_add_an_option_of_the_transformer(copy):
    copy.replace(
        "config.py",
        "    qk_norm: bool = _added(False)\n",
        '    toy_scale: float = 1.0\n    """Scale of the feed-forward layer\'s output."""\n'
        "    qk_norm: bool = _added(False)\n",
    )
    copy.replace(
        "models/transformer/blocks.py",
        "        self.ffn_dropout = training_ops.Dropout(config.ffn_dropout)\n",
        "        self.ffn_dropout = training_ops.Dropout(config.ffn_dropout)\n"
        "        self.toy_scale = config.toy_scale\n",
    )
    copy.replace(
        "models/transformer/blocks.py",
        "return self.ffn_dropout(self.w2(",
        "return self.toy_scale * self.ffn_dropout(self.w2(",
    )
    assert copy.changed == files_named("An option of the transformer")
    copy.check("check_option")


def check_option() -> None:
    import tempfile

    import pytest
    import torch

    from llamagen.backends import CompiledStep, CpuStep, ReferenceStep, fastest_step
    from llamagen.models.transformer import Transformer
    from llamagen.support.errors import InputError
    from llamagen.vllm_plugin.export import export_for_vllm
    from tests.tiny_models import tiny_transformer

    sizes = {"dim": 64, "heads": 2}
    plain, toy = tiny_transformer(**sizes), tiny_transformer(toy_scale=2.0, **sizes)
    # The reference path computes it.
    labels, tokens = torch.tensor([1]), torch.zeros(1, 16, dtype=torch.int64)
    assert not torch.equal(plain(tokens, labels), toy(tokens, labels))
    assert len(codes(toy)) == 16
    # Every fast path refuses it, until it names the field.
    assert isinstance(fastest_step(toy), ReferenceStep)
    assert not CpuStep.supports(toy)
    assert not CompiledStep.supports(toy)
    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(InputError, match="toy_scale"):
            export_for_vllm(toy, f"{folder}/vllm")
        toy.save_pretrained(f"{folder}/model")
        assert Transformer.from_pretrained(f"{folder}/model").config.toy_scale == 2.0


def test_add_a_backend(copy):
    copy.add(
        "backends/toy.py",
        "from llamagen.config import non_default_fields\n\n\n"
        "class ToyStep:\n"
        "    is_wide = False\n"
        '    FIELDS = frozenset({"dim", "layers", "heads", "hidden_dim", "codebook_size", "grid",\n'
        '                        "num_classes", "text_length", "text_dim"})\n'
        "    calls = 0\n\n"
        "    def __init__(self, model):\n"
        "        self._model = model\n\n"
        "    @classmethod\n"
        "    def supports(cls, model):\n"
        "        return not non_default_fields(model.config, cls.FIELDS)\n\n"
        "    def __call__(self, tokens, cache, grid):\n"
        "        ToyStep.calls += 1\n"
        "        return self._model.step(tokens, cache, grid=grid)\n",
    )
    copy.insert(
        "backends/__init__.py",
        before="from llamagen.models.transformer import KVCache",
        text="from llamagen.backends.toy import ToyStep\n",
    )
    copy.insert(
        "backends/__init__.py",
        before="        if CpuStep.supports(model):",
        text="        if ToyStep.supports(model):\n            return ToyStep(model)\n",
    )
    assert copy.changed == files_named("A backend")
    copy.check("check_backend")


def check_backend() -> None:
    from llamagen.backends import fastest_step, reference_only
    from llamagen.backends.toy import ToyStep
    from tests.tiny_models import tiny_transformer

    model = tiny_transformer()
    found = codes(model)
    assert ToyStep.calls == 16
    with reference_only():
        assert codes(model) == found
    assert ToyStep.calls == 16
    assert not isinstance(fastest_step(tiny_transformer(kv_heads=2)), ToyStep)


def test_add_a_schedule(copy):
    copy.add(
        "generation/schedules/toy.py",
        "from llamagen.generation.schedules.base import Pass\n\n\n"
        "class ToySchedule:\n"
        '    """One by one, and each code is fed twice."""\n\n'
        "    needs_codes = False\n"
        "    passes = 0\n\n"
        "    def __init__(self):\n"
        "        self.order = range(16)\n"
        "        self.final = 0\n"
        "        self._again = False\n\n"
        "    def first_pass(self):\n"
        "        return Pass((), (0,), (-1,))\n\n"
        "    def next_pass(self, max_tokens):\n"
        "        ToySchedule.passes += 1\n"
        "        self._again = not self._again\n"
        "        samples = () if self._again else (self.final,)\n"
        "        return Pass((self.final - 1,), samples, (0,) * len(samples))\n\n"
        "    def accept(self, codes):\n"
        "        if self._again:\n"
        "            return 0\n"
        "        is_first = self.final == 0\n"
        "        self.final += 1\n"
        "        return 0 if is_first else 1\n",
    )
    name = "generation/schedules/__init__.py"
    copy.insert(
        name, before="__all__", text="from llamagen.generation.schedules.toy import ToySchedule\n\n"
    )
    copy.insert(
        name,
        before="    total, codes = grid[0] * grid[1]",
        text="    if request.window == 5:\n        return ToySchedule()\n",
    )
    assert copy.changed == files_named("A schedule")
    copy.check("check_schedule")


def check_schedule() -> None:
    from llamagen.generation.schedules.toy import ToySchedule
    from tests.tiny_models import tiny_transformer

    model = tiny_transformer()
    assert codes(model, window=5) == codes(model)
    assert ToySchedule.passes == 2 * 15


def test_add_an_engine(copy):
    copy.add(
        "generation/toy.py",
        "import torch\n\n\n"
        "class ToyEngine:\n"
        '    """All codes of an image are its seed."""\n\n'
        '    name = "toy"\n'
        "    can_edit = False\n"
        "    copies_model = False\n"
        "    max_images = 1\n"
        "    alive = True\n\n"
        "    def __init__(self, model):\n"
        "        self.grid = model.config.grid\n\n"
        "    def check(self, request):\n"
        "        pass\n\n"
        "    def batch_size(self, requests):\n"
        "        return 1\n\n"
        "    def generate(self, requests, *, batch_size=None, on_progress=None):\n"
        "        seeds = torch.tensor([request.seed for request in requests])\n"
        "        return seeds.view(-1, 1, 1).expand(-1, *self.grid)\n\n"
        "    async def stream(self, request, *, client=None):\n"
        "        yield [request.seed] * (self.grid[0] * self.grid[1])\n\n"
        "    async def close(self):\n"
        "        pass\n\n"
        "    def shutdown(self):\n"
        "        pass\n",
    )
    name = "pipeline/models.py"
    copy.insert(
        name,
        before="from llamagen.models.tokenizer import",
        text="from llamagen.generation.toy import ToyEngine\n",
    )
    copy.replace(name, "in (NativeEngine, VllmEngine)", "in (NativeEngine, VllmEngine, ToyEngine)")
    assert copy.changed == files_named("An engine")
    copy.check("check_engine")


def check_engine() -> None:
    import base64
    import io

    from fastapi.testclient import TestClient
    from PIL import Image

    from llamagen.pipeline import Pipeline
    from llamagen.serving.api import create_app
    from llamagen.serving.metrics import ServerMetrics
    from llamagen.serving.models import ServedModel
    from llamagen.serving.settings import ServerSettings
    from tests.tiny_models import tiny_pipeline

    parts = tiny_pipeline()
    pipe = Pipeline(parts.tokenizer, parts.transformer, engine="toy")
    output = pipe([0, 1], seed=[3, 5])
    assert output.codes.flatten(1).tolist() == [[3] * 16, [5] * 16]

    metrics = ServerMetrics()
    model = ServedModel("toy", pipe, pipe.code_engine, metrics=metrics, max_in_flight=8)
    app = create_app([model], metrics=metrics, settings=ServerSettings())
    with TestClient(app) as client:
        answer = client.post("/v1/images/generations", json={"prompt": "1", "seed": 5}).json()
    with Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))) as image:
        assert image.tobytes() == output.images[1].tobytes()
