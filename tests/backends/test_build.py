"""Compiling and keeping the result, with a source that compiles in no time."""

import logging
import os
import subprocess
import sys

import pytest

from llamagen.backends.cpu import build

pytestmark = pytest.mark.skipif(build._compiler() is None, reason="needs a compiler for C")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMAGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LLAMAGEN_KERNELS", raising=False)
    monkeypatch.delenv("LLAMAGEN_KERNEL_FLAGS", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "answer.c"
    path.write_text(
        "#ifndef ANSWER\n#define ANSWER 42\n#endif\nint answer(void) { return ANSWER; }\n"
    )
    return path


def libraries(cache):
    return list((cache / "kernels").iterdir())


def test_compiles_once(cache, source, monkeypatch):
    assert build.compiled_library(source=source).answer() == 42
    (library,) = libraries(cache)
    written = library.stat().st_mtime_ns
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    assert build.compiled_library(source=source).answer() == 42
    assert library.stat().st_mtime_ns == written


def test_compiles_again_for_another_processor(cache, source, monkeypatch):
    build.compiled_library(source=source)
    monkeypatch.setattr(build, "_processor", lambda: "another one")
    build.compiled_library(source=source)
    assert len(libraries(cache)) == 2


def test_flags_of_the_environment_come_before_those_of_the_call(cache, source, monkeypatch):
    monkeypatch.setenv("LLAMAGEN_KERNEL_FLAGS", "-O1 -DANSWER=43")
    assert build.compiled_library(source=source).answer() == 43
    assert build.compiled_library("-UANSWER", source=source).answer() == 42
    monkeypatch.delenv("LLAMAGEN_KERNEL_FLAGS")
    assert build.compiled_library(source=source).answer() == 42
    assert len(libraries(cache)) == 3


def test_goes_without_kernels_where_there_is_no_compiler(monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert build.compiled_library() is None
    assert "there is no compiler for C here; install gcc or clang" in caplog.text


def test_goes_without_kernels_where_the_compiler_fails(tmp_path, cache, monkeypatch, caplog):
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'decode.c:1: error: out of ideas' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with caplog.at_level(logging.WARNING):
        assert build.compiled_library() is None
    assert "out of ideas" in caplog.text
    assert libraries(cache) == []


def test_goes_without_kernels_where_nothing_can_be_written(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLAMAGEN_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert build.compiled_library() is None
    assert "decoding without its kernels" in caplog.text


def test_switched_off(monkeypatch):
    monkeypatch.setenv("LLAMAGEN_KERNELS", "off")
    assert build.compiled_library() is None


def test_several_processes_compile_at_once(cache, source):
    code = "import sys, pathlib; from llamagen.backends.cpu import build; "
    code += "print(build.compiled_library(source=pathlib.Path(sys.argv[1])).answer())"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(source)],
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ),
        )
        for _ in range(3)
    ]
    assert [process.communicate(timeout=300)[0] for process in running] == ["42\n"] * 3
    assert [process.returncode for process in running] == [0] * 3
    assert len(libraries(cache)) == 1
