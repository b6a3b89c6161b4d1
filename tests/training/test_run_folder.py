import dataclasses
import json
import shutil

import pytest

from llamagen.data import open_images
from llamagen.data.extraction import extract_store
from llamagen.data.views import Views
from llamagen.models.tokenizer import ImageTokenizer
from llamagen.support.errors import InputError
from llamagen.support.locks import folder_lock
from llamagen.training import train_tokenizer, train_transformer
from llamagen.training.run_folder import MAY_CHANGE, open_run
from tests.images import write_digits
from tests.tiny_models import tiny_tokenizer
from tests.training.runs import records, tokenizer_recipe, transformer_recipe


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    """A finished run of two steps; tests copy it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    train_tokenizer(tokenizer_recipe(digits, out, steps=2), quiet=True)
    return out


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.5}, "began with loop.lr 0.001, now it is 0.5; restore it, or give another `out`"),
        ({"batch_size": 8}, "began with loop.batch_size 4, now it is 8"),
        ({"dropout": 0.5}, "began with model.dropout 0.1, now it is 0.5"),
        ({"precision": "bfloat16"}, "began with loop.precision float32, now it is bfloat16"),
        ({"codebook_init": "data"}, "began with codebook_init random, now it is data"),
    ],
)
def test_rejects_changes_that_affect_the_result(digits, out, changes, message):
    with pytest.raises(InputError, match=message):
        train_tokenizer(tokenizer_recipe(digits, out, **{"steps": 2, **changes}), quiet=True)


def test_accepts_changes_that_do_not_affect_the_result(digits, out):
    recipe = tokenizer_recipe(
        digits, out, steps=3, log_every=1, save_every=1, keep_checkpoints=1, precision="auto"
    )
    assert train_tokenizer(recipe, quiet=True).steps == 3
    assert [record["step"] for record in records(out)] == [2, 2, 3, 3]


def test_fields_that_may_change_exist(digits, out):
    fields = set()
    for recipe in (tokenizer_recipe(digits, out), transformer_recipe(digits, "", out)):
        for name, value in vars(recipe).items():
            inner = vars(value) if dataclasses.is_dataclass(value) else {}
            fields |= {name, *(f"{name}.{key}" for key in inner)}
    assert fields >= MAY_CHANGE


def test_steps_are_part_of_a_cosine(digits, tmp_path):
    for steps, message in ((2, None), (3, "began with loop.steps 2, now it is 3")):
        recipe = tokenizer_recipe(digits, tmp_path / "out", steps=steps, schedule="cosine")
        if message is None:
            train_tokenizer(recipe, quiet=True)
        else:
            with pytest.raises(InputError, match=message):
                train_tokenizer(recipe, quiet=True)


def test_fewer_steps_than_done(digits, out):
    with pytest.raises(InputError, match="is at step 2 already"):
        train_tokenizer(tokenizer_recipe(digits, out, steps=1), quiet=True)


def test_no_resume(digits, out):
    with pytest.raises(InputError, match="holds a run already"):
        train_tokenizer(tokenizer_recipe(digits, out, steps=2, resume=False), quiet=True)


def test_another_kind_of_run(digits, out):
    with pytest.raises(InputError, match="holds another kind of run"):
        open_run(transformer_recipe(digits, "anything", out))


def test_other_peoples_folder(digits, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="is not empty and holds no run"):
        train_tokenizer(tokenizer_recipe(digits, tmp_path), quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_way(digits, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(InputError, match="is a file; give `out` a folder"):
        train_tokenizer(tokenizer_recipe(digits, tmp_path / "out"), quiet=True)


def test_unwritable(digits, tmp_path, monkeypatch):
    def refuse(*_args, **_keywords):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(InputError, match=r"cannot write to .*out \(Permission denied\)"):
        train_tokenizer(tokenizer_recipe(digits, tmp_path / "out"), quiet=True)


def test_a_run_without_checkpoints_may_begin_anew(digits, out):
    shutil.rmtree(out / "checkpoints")
    result = train_tokenizer(tokenizer_recipe(digits, out, steps=1, lr=0.5), quiet=True)
    assert result.steps == 1
    assert {record["step"] for record in records(out)} == {1}


def test_bad_input_leaves_nothing_behind(digits, tmp_path):
    out = tmp_path / "out"
    for recipe in (
        tokenizer_recipe(tmp_path / "missing", out),
        tokenizer_recipe(None, out),
        tokenizer_recipe(digits, out, validation_data=tmp_path / "missing"),
    ):
        with pytest.raises((InputError, FileNotFoundError)):
            train_tokenizer(recipe, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_other_images(digits, out, tmp_path):
    other = write_digits(tmp_path / "other", per_class=5)
    with pytest.raises(InputError, match="the set of training images is not what the run"):
        train_tokenizer(tokenizer_recipe(other, out, steps=3), quiet=True)


def rewritten(folder, number=0):
    """Another image in a file of the same name and size."""
    path = sorted(folder.rglob("*.bmp"))[number]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.fixture
def bitmaps(tmp_path):
    return write_digits(tmp_path / "bitmaps", suffix=".bmp")


def test_other_content(bitmaps, tmp_path):
    train_tokenizer(tokenizer_recipe(bitmaps, tmp_path / "out", steps=2), quiet=True)
    before = (tmp_path / "out" / "checkpoints" / "step-0000002" / "state.pt").read_bytes()
    for number in range(24):
        rewritten(bitmaps, number)
    with pytest.raises(InputError, match="the set of training images is not what the run"):
        train_tokenizer(tokenizer_recipe(bitmaps, tmp_path / "out", steps=3), quiet=True)
    assert (tmp_path / "out/checkpoints/step-0000002/state.pt").read_bytes() == before
    for number in range(24):
        rewritten(bitmaps, number)
    train_tokenizer(tokenizer_recipe(bitmaps, tmp_path / "out", steps=3), quiet=True)


@pytest.mark.parametrize("encode", ["once", "always"])
def test_other_content_of_a_transformers_images(bitmaps, tokenizer_folder, tmp_path, encode):
    def train(steps):
        recipe = transformer_recipe(
            bitmaps, tokenizer_folder, tmp_path / "out", steps=steps, encode=encode
        )
        return train_transformer(recipe, quiet=True)

    train(1)
    codes = {path: path.read_bytes() for path in (tmp_path / "out" / "codes").rglob("*.npy")}
    assert codes
    for number in range(24):
        rewritten(bitmaps, number)
    with pytest.raises(InputError, match="are not what the run in "):
        train(2)
    # They took long to make, and the images may be restored.
    assert all(path.read_bytes() == content for path, content in codes.items())


def test_other_content_of_a_store(digits, tokenizer_folder, tmp_path):
    tokenizer = ImageTokenizer.from_pretrained(tokenizer_folder)
    codes = tmp_path / "codes"
    views = Views(height=16, width=16)
    extract_store(tokenizer, open_images(digits), views, codes, progress=False)

    def train(steps):
        recipe = transformer_recipe(None, tokenizer_folder, tmp_path / "out", steps=steps)
        recipe = dataclasses.replace(recipe, codes=codes, views="center")
        return train_transformer(recipe, quiet=True)

    train(1)
    content = bytearray((codes / "shard-00000.npy").read_bytes())
    content[-2] ^= 1
    (codes / "shard-00000.npy").write_bytes(content)
    with pytest.raises(InputError, match="the training codes is not what the run"):
        train(2)
    content[-2] ^= 1
    (codes / "shard-00000.npy").write_bytes(content)
    train(2)


def test_runs_of_older_versions_go_on(digits, out):
    (path,) = out.glob("checkpoints/step-*/about.json")
    about = json.loads(path.read_text())
    about["data"] = {name: text.split(" content ")[0] for name, text in about["data"].items()}
    path.write_text(json.dumps(about))
    assert train_tokenizer(tokenizer_recipe(digits, out, steps=3), quiet=True).steps == 3


def test_another_run_in_the_folder(digits, out, tokenizer_folder):
    with folder_lock(out):
        files = sorted(out.rglob("*"))
        for train, recipe in (
            (train_tokenizer, tokenizer_recipe(digits, out, steps=3)),
            (train_transformer, transformer_recipe(digits, tokenizer_folder, out)),
        ):
            with pytest.raises(InputError, match="another run is working in"):
                train(recipe, quiet=True)
        assert sorted(out.rglob("*")) == files
    assert train_tokenizer(tokenizer_recipe(digits, out, steps=3), quiet=True).steps == 3
    assert not list(out.glob(".*"))


def test_moved_images(digits, out, tmp_path):
    moved = shutil.copytree(digits, tmp_path / "moved")
    assert train_tokenizer(tokenizer_recipe(moved, out, steps=3), quiet=True).steps == 3


def test_another_tokenizer(digits, tokenizer_folder, tmp_path):
    out = tmp_path / "out"
    train_transformer(transformer_recipe(digits, tokenizer_folder, out, steps=1), quiet=True)
    tiny_tokenizer(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="or the image tokenizer are not what the run in "):
        train_transformer(transformer_recipe(digits, tmp_path / "other", out, steps=2), quiet=True)


def test_resumed_run_keeps_precision(digits, out, monkeypatch):
    monkeypatch.setattr("llamagen.training.run_folder.find_dtype", lambda *_: "torch.bfloat16")
    assert open_run(tokenizer_recipe(digits, out, precision="auto")).loop.precision == "float32"
    fresh = tokenizer_recipe(digits, out / "fresh", precision="auto")
    assert open_run(fresh).loop.precision == "bfloat16"
    monkeypatch.setattr("llamagen.training.run_folder.find_dtype", lambda *_: "torch.float16")
    assert open_run(fresh).loop.precision == "float32"
