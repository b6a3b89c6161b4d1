"""Locks on folders, between processes."""

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llamagen.support.errors import InputError
from llamagen.support.locks import folder_lock

_HOLDER = """
import os, sys, time
from llamagen.support.locks import folder_lock
with folder_lock(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])):
    is_worker = os.fork() == 0
    if not is_worker:
        print("held", flush=True)
    time.sleep(5 if is_worker else 60)
    os._exit(0)
"""


@contextlib.contextmanager
def held_elsewhere(folder: Path, rank: int = 0, world_size: int = 1):
    command = [sys.executable, "-c", _HOLDER, str(folder), str(rank), str(world_size)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def refused(folder, rank=0, world_size=1):
    with (
        pytest.raises(InputError, match=r"another run is working in .*choose another folder"),
        folder_lock(folder, rank, world_size, timeout=0.1),
    ):
        pass


def test_excludes_other_runs_until_killed(tmp_path):
    """Even if a worker that the run forked is still there."""
    with held_elsewhere(tmp_path) as process:
        refused(tmp_path)
        refused(tmp_path, 0, 2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with folder_lock(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


def test_processes_of_a_run_share(tmp_path):
    with held_elsewhere(tmp_path, 0, 2):
        with folder_lock(tmp_path, 1, 2):
            refused(tmp_path)
        refused(tmp_path)
        # Another run of several processes has a rank 0, too.
        refused(tmp_path, 0, 4)


def test_excludes_within_a_process(tmp_path):
    with folder_lock(tmp_path):
        refused(tmp_path)


def test_waits(tmp_path):
    with held_elsewhere(tmp_path) as process:
        start = time.monotonic()
        process.terminate()
        with folder_lock(tmp_path, timeout=30):
            assert time.monotonic() - start < 30


def test_released_after_an_error(tmp_path):
    with pytest.raises(KeyError), folder_lock(tmp_path, 1, 3):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with folder_lock(tmp_path):
        pass


def test_works_unlocked_where_the_file_system_cannot_lock(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("llamagen.support.locks.fcntl.flock", refuse)
    with folder_lock(tmp_path), folder_lock(tmp_path):
        pass
