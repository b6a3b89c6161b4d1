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
    build._warn_once.cache_clear()
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


def test_no_kernels_without_compiler(monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert build.compiled_library() is None
    assert "there is no compiler for C here; install gcc or clang" in caplog.text


def test_no_kernels_if_the_compiler_fails(tmp_path, cache, monkeypatch, caplog):
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'step.c:1: error: out of ideas' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with caplog.at_level(logging.WARNING):
        assert build.compiled_library() is None
    assert "out of ideas" in caplog.text
    assert not cache.exists()


def test_uses_existing_build_without_compiler(cache, source, monkeypatch):
    build.compiled_library(source=source)
    monkeypatch.setenv("PATH", "")
    assert build._compiler() is None
    assert build.compiled_library(source=source).answer() == 42


def damage(path, how):
    content = path.read_bytes()
    path.unlink()  # the library is in use in this process
    path.write_bytes(
        {
            "empty": b"",
            "truncated": content[: len(content) // 2],
            "zeroed": bytes(len(content)),
            "a page of zeros": content[:-4096] + bytes(4096),
            "longer": content + b"\0",
        }[how]
    )
    assert path.read_bytes() != content


@pytest.mark.parametrize("how", ["empty", "truncated", "zeroed", "a page of zeros", "longer"])
def test_compiles_damaged_libraries_again(cache, source, how, caplog):
    build.compiled_library(source=source)
    (library,) = libraries(cache)
    intact = library.read_bytes()
    damage(library, how)
    with caplog.at_level(logging.WARNING):
        assert build.compiled_library(source=source).answer() == 42
    assert not caplog.text
    (library,) = libraries(cache)
    assert library.read_bytes() == intact


def test_damaged_libraries_are_not_loaded_without_a_compiler(cache, source, monkeypatch, caplog):
    build.compiled_library(source=source)
    damage(libraries(cache)[0], "truncated")
    monkeypatch.setenv("PATH", "")
    with caplog.at_level(logging.WARNING):
        assert build.compiled_library(source=source) is None
    assert "there is no compiler" in caplog.text


def test_stores_under_the_home_that_a_tilde_means(tmp_path, source, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LLAMAGEN_CACHE", "~/own")
    assert build.compiled_library(source=source).answer() == 42
    assert len(libraries(tmp_path / "home" / "own")) == 1


def compiles_each_time(source, caplog):
    with caplog.at_level(logging.WARNING):
        assert build.compiled_library(source=source).answer() == 42
        assert build.compiled_library(source=source).answer() == 42
    assert caplog.text.count("cannot be kept, so that each start compiles them") == 1
    assert len(caplog.records) == 1


def test_compiles_into_a_temporary_folder_where_nothing_can_be_written(
    tmp_path, source, monkeypatch, caplog
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLAMAGEN_CACHE", str(tmp_path / "file"))
    compiles_each_time(source, caplog)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_compiles_into_a_temporary_folder_where_the_cache_is_read_only(
    cache, source, monkeypatch, caplog
):
    cache.mkdir()
    cache.chmod(0o555)
    compiles_each_time(source, caplog)


def test_compiles_into_a_temporary_folder_without_a_home(source, monkeypatch, caplog):
    monkeypatch.delenv("LLAMAGEN_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(type(source), "expanduser", no_home)
    compiles_each_time(source, caplog)


def test_compiles_into_a_temporary_folder_where_the_cache_is_not_executable(
    cache, source, monkeypatch, caplog
):
    load = build.ctypes.CDLL

    def refuse(name):
        if name.startswith(str(cache)):
            raise OSError(f"{name}: failed to map segment from shared object")
        return load(name)

    monkeypatch.setattr(build.ctypes, "CDLL", refuse)
    compiles_each_time(source, caplog)
    assert len(libraries(cache)) == 1


def test_no_kernels_if_loading_fails(source, monkeypatch, caplog):
    def refuse(name):
        raise OSError("failed to map segment from shared object")

    monkeypatch.setattr(build.ctypes, "CDLL", refuse)
    with caplog.at_level(logging.WARNING):
        assert build.compiled_library(source=source) is None
    assert "computing without compiled kernels, which is slower: failed to map" in caplog.text


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
        for _ in range(2)
    ]
    assert [process.communicate(timeout=300)[0] for process in running] == ["42\n"] * 2
    assert [process.returncode for process in running] == [0] * 2
    assert len(libraries(cache)) == 1
