import signal
import subprocess
import sys

import pytest

from llamagen.pipeline import Pipeline
from tests.images import write_digits
from tests.tiny_models import tiny_tokenizer


def words_of(text):
    return text.split()


LOOP = words_of("--steps 2 --batch-size 4 --precision float32 --device cpu --log-every 1")
TOKENIZER = words_of(
    "--size 16 --validation-fraction 0.2 --codebook-size 32 --codebook-dim 4 --base-channels 8 "
    "--channel-multipliers 1 1 2 --norm-groups 4 --z-channels 8 --encoder-blocks 1 "
    "--decoder-blocks 1"
)
TRANSFORMER = words_of(
    "--size 16 --validation-fraction 0.2 --views center --dim 32 --layers 1 --heads 2 "
    "--hidden-dim 64 --sample-images 3"
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits") / "images")


@pytest.fixture
def train_tokenizer(run, digits, tmp_path):
    def train(*arguments):
        where = ("--data", digits, "--out", tmp_path / "tokenizer")
        return run("train", "tokenizer", *where, *TOKENIZER, *LOOP, *arguments)

    return train


def test_both_stages_and_generation(run, train_tokenizer, digits, tmp_path):
    trained = train_tokenizer()
    assert trained.status == 0, trained.err
    lines = trained.out.splitlines()
    assert lines[0].startswith("step 1/2  loss ")
    assert "images/s" in lines[0]
    assert any(line.startswith("step 2/2  validation: psnr ") for line in lines)
    assert lines[-2].startswith("2 steps in ")
    assert lines[-1] == str(tmp_path / "tokenizer" / "tokenizer")

    out = tmp_path / "transformer"
    where = ("--data", digits, "--tokenizer", lines[-1], "--out", out)
    trained = run("train", "transformer", *where, *TRANSFORMER, *LOOP)
    assert trained.status == 0, trained.err
    assert trained.out.splitlines()[-1] == str(out / "pipeline")
    pipe = Pipeline.from_pretrained(out / "pipeline", device="cpu", dtype="float32")
    assert pipe.labels.names == ("0", "1", "2")

    drawn = run("generate", "--model", out / "pipeline", "--class", "2", "--out", tmp_path / "x")
    assert drawn.status == 0, drawn.err


def test_same_command_resumes(train_tokenizer):
    train_tokenizer()
    again = train_tokenizer("--steps", "3")
    assert again.out.startswith("going on after step 2 of the run in ")
    assert "step 3/3" in again.out


def test_corrupt_files_are_reported(run, tmp_path):
    data = write_digits(tmp_path / "data")
    (data / "0" / "000.png").write_bytes(b"")
    out = tmp_path / "out"
    result = run("train", "tokenizer", "--data", data, "--out", out, *TOKENIZER, *LOOP,
                 "--steps", "8", "--validation-fraction", "0")  # fmt: skip
    assert result.status == 0, result.err
    assert f"1 files could not be read; see {out / 'skipped.txt'}" in result.out


def test_recipe_and_flags(run, tmp_path, digits):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("loop: {steps: 5, lr: 3e-3}\nimages: {size: 16}\nmodel: {codebook_size: 7}\n")
    out = tmp_path / "out"
    where = ("--data", digits, "--out", out)
    small = TOKENIZER[2:4] + TOKENIZER[6:]
    assert run("train", "tokenizer", f"--recipe={recipe}", *where, *small, *LOOP).status == 0
    written = (out / "recipe.yaml").read_text()
    assert "lr: 0.003" in written, "from the file"
    assert "codebook_size: 7" in written
    assert "steps: 2" in written, "a flag goes before the file"
    # What a run wrote down is a recipe for another.
    other = run("train", "tokenizer", "--recipe", out / "recipe.yaml", "--out", tmp_path / "again")
    assert other.status == 0, other.err


def test_help_shows_the_recipe_s_values(run):
    result = run("train", "tokenizer", "--recipe", "digits-tokenizer", "--help")
    assert result.status == 0
    text = " ".join(result.out.replace("│", " ").split())
    assert "--codebook-size INT Number of codes. (default: 128)" in text
    assert "(default: digits-tokenizer)" in text


@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_help(run, stage):
    result = run("train", stage, "--help")
    assert result.status == 0
    text = " ".join(result.out.replace("│", " ").split())
    for flag in ("--data", "--out", "--recipe", "--preset", "--steps", "--lr", "--resume, --no-"):
        assert flag in text


def test_preset(run):
    text = run("train", "transformer", "--preset", "XL", "--help").out
    assert "(default: 1280)" in " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--recipe no-such", "there is no recipe 'no-such'"),
        ("--recipe missing/x.yaml", "missing/x.yaml does not exist"),
        ("--recipe", "--recipe needs a value"),
        ("--preset VQ-9", "there is no preset 'VQ-9'; choose one of VQ-16, VQ-8"),
        ("", "no images were named; give --data a folder"),
        ("--data missing", "missing does not exist; give a folder with images"),
        ("--data {empty}", "there are no images in"),
        ("--data {digits} --out {digits}", "is not empty and holds no run"),
        ("--data {digits} --size 100", "multiples of the tokenizer's downsampling 16"),
        ("--data {digits} --device tpu", "there is no device 'tpu'"),
    ],
)
def test_bad_input(fails, digits, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    words = arguments.format(digits=digits, empty=tmp_path / "empty").split()
    out = () if "--out" in words else ("--out", tmp_path / "out")
    assert message in fails("train", "tokenizer", *words, *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--precision float16", "invalid choice 'float16'"),
        ("--steps 0", "steps is 0, expected at least 1"),
        ("--lr fast", "fast"),
    ],
)
def test_bad_values(run, digits, tmp_path, arguments, message):
    where = ("--data", digits, "--out", tmp_path / "out")
    result = run("train", "tokenizer", *where, *arguments.split())
    assert result.status == 2
    assert message in " ".join(result.err.replace("│", " ").split())
    assert "Traceback" not in result.err
    assert not (tmp_path / "out").exists()


def test_unknown_key_in_a_recipe(fails, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("loop:\n  stepz: 5\n")
    line = fails("train", "tokenizer", "--recipe", recipe)
    assert "mine.yaml" in line
    assert "stepz" in line


def test_a_tokenizer_that_is_none(fails, digits, tmp_path):
    where = ("--data", digits, "--tokenizer", tmp_path / "none", "--out", tmp_path / "out")
    assert "none" in fails("train", "transformer", *where, *TRANSFORMER)


def test_too_few_classes(fails, digits, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    where = ("--data", digits, "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "out")
    line = fails("train", "transformer", *where, *TRANSFORMER, "--num-classes", 2)
    assert "num_classes is 2" in line


def test_ctrl_c(digits, tmp_path):
    """The first asks the run to save and stop; it says how to go on."""
    command = [sys.executable, "-m", "llamagen", "train", "tokenizer", "--data", str(digits)]
    command += ["--out", str(tmp_path / "out"), *TOKENIZER, *LOOP, "--steps", "100000"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout.readline().startswith("step 1/")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "stopped after step" in err
    assert "the same command goes on from there" in err
    assert "Traceback" not in err
    assert list((tmp_path / "out" / "checkpoints").glob("step-*"))


def test_importing_the_commands_is_cheap():
    program = "import sys, llamagen.cli.train; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
