import subprocess
import sys

import pytest

from llamagen.cli.main import COMMANDS, _with_flags


def test_overview(run):
    result = run("--help")
    assert result.status == 0
    for command in COMMANDS:
        assert command in result.out
    assert run().out == result.out


def test_version(run):
    assert run("--version").out.startswith("llamagen 0.")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run, command):
    result = run(*command.split(), "--help")
    assert result.status == 0
    assert f"usage: llamagen {command}" in result.out


def test_help_does_not_load_torch():
    """Importing torch would make --help slow; the time itself depends on the machine."""
    for arguments in (["--help"], ["generate", "--help"]):
        program = (
            "import sys\n"
            "from llamagen.cli.main import main\n"
            "try:\n"
            f"    main({arguments!r})\n"
            "except SystemExit:\n"
            "    pass\n"
            "sys.exit('torch' in sys.modules)\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
        assert done.returncode == 0, arguments


def test_unknown_commands(fails):
    assert "generate" in fails("draw")
    assert "train tokenizer or train transformer" in fails("train")


def test_unknown_flags(run):
    result = run("generate", "--no-such-flag", "1")
    assert result.status == 2
    assert "no-such-flag" in result.err


def test_a_device_that_is_not_there(fails, model_folder, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    line = fails(
        "generate", "--model", model_folder, "--class", "dog", "--device", "cuda", "--out", tmp_path
    )
    assert "--device cpu" in line


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "llamagen", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("llamagen ")


def test_parameters_in_errors_become_flags():
    message = (
        "give another `out` or `image_column`, with `num_images_per_prompt` or `prompt_embeds`"
    )
    assert _with_flags(message, "generate") == (
        "give another --out or `image_column`, with --num-images or `prompt_embeds`"
    )
    # Of nested options too, but nothing that is given without a flag.
    assert (
        _with_flags("`image_column` of `images`", "extract-codes") == "--image-column of `images`"
    )
