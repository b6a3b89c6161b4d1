"""One row of ``SamplingConfig`` is all that a sampling setting needs on its way to users."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import llamagen
from llamagen.config import sampling_settings

PACKAGE = Path(llamagen.__file__).parent
PROGRAM = Path(__file__).parent / "toy_settings.py"


@pytest.fixture(scope="module")
def found():
    """What users meet in a process where ``SamplingConfig`` has two more rows."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.toy_settings"],
        cwd=PROGRAM.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "command",
    [
        *("generate", "evaluate c2i", "evaluate t2i", "evaluate sweep"),
        *("edit complete", "edit inpaint", "edit outpaint", "edit vary"),
    ],
)
def test_flags(found, command):
    text = " ".join(found["help"][command].replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())
    assert "--toy-share {None}|FLOAT" in text
    assert "Of the toys. Default: the" in text
    assert "--toy-kind {None,soft,hard}" in text


def test_metadata(found):
    assert found["metadata"]["toy_share"] == 0.25
    assert found["metadata"]["toy_kind"] == "hard"
    assert found["metadata_of_call"]["toy_share"] == 0.125
    assert found["metadata_of_call"]["toy_kind"] == "hard"


def test_image_is_made_like_another(found):
    first, second = found["generated"]
    assert first["toy_share"] == 0.375
    assert first == second


def test_model_folder(found):
    assert found["loaded"] == {"toy_share": 0.25, "toy_kind": "hard"}


def test_schema_of_requests(found):
    for name in ("ImageRequest", "EditRequest", "VariationRequest"):
        number, none = found["schemas"][name]["toy_share"]["anyOf"]
        assert number == {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}
        assert none == {"type": "null"}
        assert found["schemas"][name]["toy_share"]["description"].startswith("Of the toys.")
        word, _ = found["schemas"][name]["toy_kind"]["anyOf"]
        assert word == {"type": "string", "enum": ["soft", "hard"]}


def test_request(found):
    assert found["answer"]["settings"]["toy_share"] == 0.125
    assert found["answer"]["settings"]["toy_kind"] == "hard"
    assert found["refused"]["param"] == "toy_share"
    assert "0.5" in found["refused"]["message"]


def test_models_declare_it(found):
    declared = {each["name"]: each for each in found["card"]["declared_settings"]}
    assert declared["toy_share"] == {
        "name": "toy_share",
        "type": "float",
        "help": "Of the toys.",
        "default": 0.25,
        "minimum": 0,
        "exclusive_minimum": True,
        "maximum": 0.5,
        "choices": [],
        "optional": False,
    }
    assert declared["toy_kind"]["type"] == "str"
    assert declared["toy_kind"]["choices"] == ["soft", "hard"]


def test_no_surface_lists_settings():
    """The page, the server and the command line name no setting that all declare."""
    rooms = [PACKAGE / name for name in ("serving", "cli", "assets/ui")]
    files = [path for room in rooms for path in room.rglob("*.*") if path.suffix != ".pyc"]
    assert len(files) > 20
    # The first two are what a sweep varies; the last one is a word, and an option of bench.
    others = {"guidance_scale", "top_k", "steps"}
    names = {setting.name for setting in sampling_settings()} - others
    assert len(names) >= 3
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert not [name for name in names if name in text], path
