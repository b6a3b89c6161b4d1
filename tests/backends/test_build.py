import logging
import os
import subprocess
import sys

import pytest

from llamagen.backends.cpu import build

pytestmark = pytest.mark.skipif(build._compiler() is None, reason="needs a compiler for C")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMAGEN_CACHE", str(tmp_path))
    monkeypatch.delenv("LLAMAGEN_KERNELS", raising=False)
    return tmp_path


def test_what_was_compiled_is_kept(cache, monkeypatch):
    assert build.compiled_library() is not None
    (made,) = (cache / "kernels").iterdir()
    written = made.stat().st_mtime_ns
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    assert build.compiled_library() is not None
    assert made.stat().st_mtime_ns == written


def test_other_processors_get_their_own(cache, monkeypatch):
    build.compiled_library()
    monkeypatch.setattr(build, "_processor", lambda: "another one")
    build.compiled_library()
    assert len(list((cache / "kernels").iterdir())) == 2


def test_without_a_compiler(monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert build.compiled_library() is None
    assert "there is no compiler for C here; install gcc or clang" in caplog.text


def test_a_compiler_that_fails(tmp_path, cache, monkeypatch, caplog):
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'decode.c:1: error: out of ideas' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with caplog.at_level(logging.WARNING):
        assert build.compiled_library() is None
    assert "out of ideas" in caplog.text
    assert list((cache / "kernels").iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLAMAGEN_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert build.compiled_library() is None
    assert "decoding without its kernels" in caplog.text


def test_switched_off(monkeypatch):
    monkeypatch.setenv("LLAMAGEN_KERNELS", "off")
    assert build.compiled_library() is None


def test_several_processes_at_once(cache):
    code = "from llamagen.backends.cpu import load_kernels; print(sorted(load_kernels().features))"
    command = [sys.executable, "-c", code]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
        for _ in range(3)
    ]
    said = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0] * 3
    assert len(said) == 1
    assert len(list((cache / "kernels").iterdir())) == 1
