"""The ``llamagen`` program: its commands, their options as dataclasses, and its errors.

Every command is a frozen dataclass, whose fields are the flags, beside a function ``run(options)``
that several may share. It may have a class method ``defaults(arguments)``, which takes what it
knows (a recipe file) off the arguments and returns the options to start from and the rest.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib
import importlib.metadata
import inspect
import io
import os
import re
import sys
import typing
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from llamagen.support.errors import InputError

COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("generate:Generate", "draw images of texts or classes"),
    "edit complete": ("generate:Complete", "keep the upper part of an image"),
    "edit inpaint": ("generate:Inpaint", "draw a marked part of an image anew"),
    "edit outpaint": ("generate:Outpaint", "extend an image down and to the right"),
    "edit vary": ("generate:Vary", "draw variations of an image"),
    "reconstruct": ("reconstruct:Reconstruct", "send images through an image tokenizer and back"),
    "train tokenizer": ("train:Tokenizer", "train an image tokenizer on a folder"),
    "train transformer": ("train:Transformer", "train a transformer on a folder"),
    "extract-codes": ("extract:Codes", "encode a folder of images once, into shards"),
    "extract-text": ("extract:Text", "encode captions once, into shards"),
    "evaluate c2i": ("evaluate:Classes", "FID and the like of images drawn by class"),
    "evaluate t2i": ("evaluate:Texts", "FID and CLIP score of images drawn of texts"),
    "evaluate tokenizer": ("evaluate:Tokenizer", "rFID, PSNR, SSIM of a tokenizer"),
    "evaluate folder": ("evaluate:Folder", "FID and the like of any two image sets"),
    "evaluate likelihood": ("evaluate:Likelihood", "bits per code of held-out images"),
    "evaluate sweep": ("evaluate:Sweep", "FID at many guidance scales and top-ks"),
    "serve": ("serve:Serve", "draw images for clients over HTTP, and on a web page"),
    "export": ("convert:Run", "write the model of a training run's checkpoint"),
    "export-vllm": ("convert:Vllm", "write a folder that vllm serve accepts"),
    "convert": ("convert:Convert", "turn published .pt checkpoints into model folders"),
    "info": ("info:Info", "describe a model, a checkpoint or a generated image"),
    "bench": ("bench:Bench", "measure how fast this machine decodes"),
    "demo": ("demo:Draw", "draw a sheet with the models that come with the package"),
    "demo-train": ("demo:Train", "train on handwritten digits and draw some"),
}
"""Command -> module of this package and its options, and one line of help."""

_REMOVED = {
    "--row-lag": "it was approximate; leave it out, codes are then exact",
    "int4": "8 bits are faster and more exact; use int8",
}
"""Flags, and values of --quantization and --precisions, of earlier versions -> the remedy."""

_USAGE_ERROR = 2
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit: 0 if it worked, 2 on bad input, 1 on a fault of the machine."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # A terminal or pipe that takes ASCII only ends no command whose work is done.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    command = ""
    try:
        command = _find_command(words)
        _run(command, words[len(command.split()) :])
    except InputError as error:
        _fail(_with_flags(str(error), command), _USAGE_ERROR)
    except KeyboardInterrupt as error:
        _fail(": ".join(("interrupted", *map(str, error.args))), _INTERRUPTED)
    except BrokenPipeError:
        # The reader of the output has gone; a flush at exit would fail, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        _fail(_describe(error), _USAGE_ERROR if isinstance(error, FileNotFoundError) else 1)
    sys.exit(0)


def _find_command(words: list[str]) -> str:
    """Return the command that ``words`` start with; exit if they ask for a list or the version."""
    first = words[0] if words else "help"
    for length in (2, 1):
        if (command := " ".join(words[:length])) in COMMANDS:
            return command
    family = {name: text for name, (_, text) in COMMANDS.items() if name.split()[0] == first}
    if first in ("-V", "--version"):
        print(f"llamagen {importlib.metadata.version('llamagen')}")
    elif first in ("-h", "--help", "help"):
        print(_overview())
    elif family and words[1:2] in (["-h"], ["--help"]):
        print("\n".join(f"llamagen {name}: {text}" for name, text in family.items()))
    elif family:
        raise InputError(f"{first} needs one more word: {' or '.join(family)}")
    else:
        raise InputError(f"there is no command {first!r}; choose one of {', '.join(COMMANDS)}")
    sys.exit(0)


def _run(command: str, arguments: list[str]) -> None:
    import tyro

    # Threads that wait for one another sleep instead of spinning: spinning makes steps of many
    # small operations tens of times slower when another program wants the processors too. It is
    # read once, when torch is first imported. The reference that bench measures is faster without.
    if command != "bench":
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _refuse_removed(arguments)
    module, kind = _implementation(command)
    keywords = {}
    if hasattr(kind, "defaults"):
        keywords["default"], arguments = kind.defaults(arguments)
    options = tyro.cli(
        kind,
        prog=f"llamagen {command}",
        description=inspect.getdoc(kind),
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
        **keywords,
    )
    module.run(options)


def _implementation(command: str) -> tuple[ModuleType, type]:
    """Return the module of a command, and the dataclass of its options."""
    name, _, kind = COMMANDS[command][0].partition(":")
    module = importlib.import_module(f"llamagen.cli.{name}")
    return module, getattr(module, kind)


def _refuse_removed(arguments: Sequence[str]) -> None:
    """Raise InputError if a flag or value is one of ``_REMOVED``."""
    flag = ""
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name.startswith("--"):
            flag = name
        else:
            value = argument
        for removed in (flag, value if flag in ("--quantization", "--precisions") else ""):
            if removed in _REMOVED:
                raise InputError(f"{removed} was removed: {_REMOVED[removed]}")


def _with_flags(message: str, command: str) -> str:
    """Return an error of the library, which names parameters as `this`, with --this for flags.

    What is no flag of the command stays as it is.
    """
    flags = _flags(_implementation(command)[1]) if command else {}

    def replace(match: re.Match[str]) -> str:
        name = "count" if match[1] == "num_images_per_prompt" else match[1]
        return f"--{flags[name]}" if name in flags else match[0]

    return re.sub(r"`(\w+)`", replace, message)


def _flags(options: type) -> dict[str, str]:
    """Return the flag of each field of a command's options, without dashes in front."""
    import tyro

    found: dict[str, str] = {}
    for name, hint in typing.get_type_hints(options, include_extras=True).items():
        kind, *notes = typing.get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
        if dataclasses.is_dataclass(kind):
            found |= _flags(typing.cast("type", kind))
        elif tyro.conf.Positional not in notes:
            given = (note.name for note in notes if getattr(note, "name", None))
            found[name] = next(given, name.replace("_", "-"))
    return found


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return f"""usage: llamagen COMMAND [OPTIONS]

Train, sample and evaluate autoregressive image models.

commands:
{lines}

llamagen COMMAND --help lists a command's options and their defaults.
llamagen --version prints the version."""


def _describe(error: OSError) -> str:
    """Return one line about a fault of files or memory."""
    if error.errno is None:
        return str(error)
    what = os.strerror(error.errno)
    if error.errno == errno.ENOSPC:
        what = "the disk is full; free some space and run the command again"
    return f"{error.filename}: {what}" if error.filename else what


def _fail(message: str, status: int) -> NoReturn:
    print(f"llamagen: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
