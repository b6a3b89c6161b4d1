"""What pyproject.toml asks for, what constraints.txt pins and what the Makefile installs agree."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
OLDEST_TORCH = "2.6"
"""Training needs torch.distributed.fsdp.fully_shard, which is not in 2.5."""


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    listed = [*project["dependencies"], *(line for extra in extras for line in extra)]
    return [Requirement(line) for line in listed if not line.startswith("llamagen")]


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if "==" in line]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_torch_is_at_least_the_oldest_that_was_run():
    (torch,) = [each for each in requirements() if each.name == "torch"]
    assert str(torch.specifier) == f">={OLDEST_TORCH}"
    assert f"torch {OLDEST_TORCH} or newer" in (ROOT / "README.md").read_text()
    assert f"torch>={OLDEST_TORCH}" in (ROOT / "deploy" / "Dockerfile").read_text()


def test_pins_lie_in_the_ranges_of_pyproject():
    pinned = pins()
    checked = [each for each in requirements() if each.name != "vllm"]  # in a venv of its own
    assert checked
    for each in checked:
        assert pinned[canonicalize_name(each.name)] in each.specifier, each


def test_every_environment_has_the_torch_that_is_pinned():
    (version,) = re.findall(r"^TORCH := torch==(.+)$", (ROOT / "Makefile").read_text(), re.M)
    assert Version(version) == pins()["torch"]
