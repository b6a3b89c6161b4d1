"""The ``llamagen`` program: its commands, their options as dataclasses, and its errors.

Every command is a module with a frozen dataclass ``Options``, whose fields are the flags, and
``run(options)``; several may share a module, each with a dataclass of its own. That may have a
class method ``defaults(arguments)``, which takes what it knows (a recipe file) off the arguments
and returns the options to start from and the rest.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib
import importlib.metadata
import inspect
import os
import re
import sys
import typing
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from llamagen.support.errors import InputError

COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("llamagen.cli.generate:Generate", "draw images of texts or classes"),
    "edit complete": ("llamagen.cli.generate:Complete", "keep the upper part of an image"),
    "edit inpaint": ("llamagen.cli.generate:Inpaint", "draw a marked part of an image anew"),
    "edit outpaint": ("llamagen.cli.generate:Outpaint", "extend an image down and to the right"),
    "edit vary": ("llamagen.cli.generate:Vary", "draw variations of an image"),
    "reconstruct": ("llamagen.cli.reconstruct", "send images through an image tokenizer and back"),
    "train tokenizer": ("llamagen.cli.train:Tokenizer", "train an image tokenizer on a folder"),
    "train transformer": ("llamagen.cli.train:Transformer", "train a transformer on a folder"),
    "extract-codes": ("llamagen.cli.extract:Codes", "encode a folder of images once, into shards"),
    "extract-text": ("llamagen.cli.extract:Text", "encode captions once, into shards"),
    "evaluate c2i": ("llamagen.cli.evaluate:Classes", "FID and the like of images drawn by class"),
    "evaluate t2i": ("llamagen.cli.evaluate:Texts", "FID and CLIP score of images drawn of texts"),
    "evaluate tokenizer": ("llamagen.cli.evaluate:Tokenizer", "rFID, PSNR, SSIM of a tokenizer"),
    "evaluate folder": ("llamagen.cli.evaluate:Folder", "FID and the like of any two image sets"),
    "evaluate likelihood": ("llamagen.cli.evaluate:Likelihood", "bits per code of held-out images"),
    "evaluate sweep": ("llamagen.cli.evaluate:Sweep", "FID at many guidance scales and top-ks"),
    "serve": ("llamagen.cli.serve", "draw images for clients over HTTP, and on a web page"),
    "export": ("llamagen.cli.convert:Run", "write the model of a training run's checkpoint"),
    "export-vllm": ("llamagen.cli.convert:Vllm", "write a folder that vllm serve accepts"),
    "convert": (
        "llamagen.cli.convert:Convert",
        "turn published .pt checkpoints into model folders",
    ),
    "info": ("llamagen.cli.info", "describe a model, a checkpoint or a generated image"),
    "bench": ("llamagen.cli.bench", "measure how fast this machine decodes"),
    "demo": ("llamagen.cli.demo:Draw", "draw a sheet with the models that come with the package"),
    "demo-train": ("llamagen.cli.demo:Train", "train on handwritten digits and draw some"),
}
"""Command -> the module that implements it, with the name of its options if that is not
``Options``, and one line of help."""

_REMOVED = {
    "--row-lag": "it was approximate; leave it out, codes are then exact",
    "int4": "8 bits are faster and more exact; use int8",
}
"""Flags, and values of --quantization and --precisions, of earlier versions -> the remedy."""

_OPTION_OF = {"num_images_per_prompt": "count"}
"""Parameter of the library -> the option of commands, where that is called something else."""

_USAGE_ERROR = 2
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit: 0 if it worked, 2 on bad input, 1 on a fault of the machine."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = ""
    try:
        command = _find_command(words)
        _run(command, words[len(command.split()) :])
    except InputError as error:
        _fail(_with_flags(str(error), command), _USAGE_ERROR)
    except KeyboardInterrupt:
        _fail("interrupted", _INTERRUPTED)
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
        description=inspect.getdoc(module if kind.__name__ == "Options" else kind),
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
        **keywords,
    )
    module.run(options)


def _implementation(command: str) -> tuple[ModuleType, type]:
    """Return the module of a command, and the dataclass of its options."""
    name, _, kind = COMMANDS[command][0].partition(":")
    module = importlib.import_module(name)
    return module, getattr(module, kind or "Options")


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
        name = _OPTION_OF.get(match[1], match[1])
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
