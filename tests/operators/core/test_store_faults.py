"""Faults that are real: a disk that is full, signals at any moment, writers that were killed."""

import fcntl
import gc
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from operators.core.artifact import to_bytes
from operators.core.errors import StoreError
from operators.core.store import Store

LEFT = ".a.0123456789abcdef.tmp"


def _snapshot(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@contextmanager
def _files_end_at(size):
    """No file of this process can grow beyond ``size`` bytes: what a full disk does, without filling one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("replace", [False, True])
def test_a_disk_that_is_full_in_mid_write_leaves_the_store_as_it_was(make_operator, tmp_path, replace):
    Store(tmp_path).save("kept", make_operator())
    if replace:
        Store(tmp_path).save("a", make_operator())
    before = _snapshot(tmp_path)
    large = make_operator(seed=1, n=40, d=20)
    for size in (0, 1, 4096, len(to_bytes(large)) - 1):
        with _files_end_at(size), pytest.raises(StoreError) as found:
            Store(tmp_path).save("a", large, replace=replace)
        assert str(found.value) == f"operator 'a' cannot be written to {tmp_path}: File too large"
        assert _snapshot(tmp_path) == before
    Store(tmp_path).save("a", large, replace=replace)
    assert Store(tmp_path).load("a").digest == large.digest


def test_an_interrupt_at_any_moment_leaves_the_old_operator_or_the_new_one(make_operator, tmp_path):
    old, new = make_operator(n=40, d=20), make_operator(seed=1, n=40, d=20)
    moments = random.Random(0)
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    interrupted = 0
    # An interrupt within a garbage collector's callback (hypothesis has one) is raised to nobody.
    gc.disable()
    try:
        for _ in range(150):
            Store(tmp_path).save("a", old, replace=True)
            timer = threading.Timer(moments.uniform(0, 2e-3), signal.raise_signal, [signal.SIGUSR1])
            try:
                timer.start()
                Store(tmp_path).save("a", new, replace=True)
                timer.cancel()
                timer.join()
            except KeyboardInterrupt:
                interrupted += 1
            assert Store(tmp_path).load("a").digest in (old.digest, new.digest)
            assert os.listdir(tmp_path) == ["a.safetensors"]
    finally:
        gc.enable()
        signal.signal(signal.SIGUSR1, before)
    assert interrupted >= 10


WRITER = """
import os, sys, time
from pathlib import Path
from operators.core.store import Store
def stop(_descriptor):
    print("in mid-write", flush=True)
    time.sleep(600)
source, target = map(Path, sys.argv[1:])
artifact = Store(source).load("a")
os.fsync = stop
Store(target).save("a", artifact)
"""


def test_what_a_killed_writer_leaves_is_no_operator_and_is_swept_by_the_next_save(make_operator, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    Store(source).save("a", make_operator())
    command = [sys.executable, "-c", WRITER, source, target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout.readline() == "in mid-write\n"
            (left,) = os.listdir(target)
            # It lives: what it writes is not touched.
            Store(target).save("b", make_operator())
            assert sorted(os.listdir(target)) == [left, "b.safetensors"]
        finally:
            writer.kill()
    assert Store(target).names() == ["b"]
    with pytest.raises(StoreError, match=r"no operator 'a' in .*; there are: b"):
        Store(target).load("a")
    Store(target).save("a", make_operator())
    assert sorted(os.listdir(target)) == ["a.safetensors", "b.safetensors"]


def test_only_temporary_files_of_a_store_are_swept(make_operator, tmp_path):
    others = ["notes.tmp", ".a.tmp", ".a.0123.tmp", ".A.0123456789abcdef.tmp", "a.0123456789abcdef.tmp", ".hidden"]
    for name in (*others, LEFT):
        (tmp_path / name).touch()
    (tmp_path / LEFT.replace("0", "1")).symlink_to(tmp_path / "nowhere")
    Store(tmp_path).save("b", make_operator())
    left = sorted(os.listdir(tmp_path))
    assert left == sorted([*others, LEFT.replace("0", "1"), "b.safetensors"])


def test_a_file_that_another_writer_swept_before_it_was_locked_is_made_again(make_operator, tmp_path, monkeypatch):
    lock, swept = fcntl.flock, []

    def sweep_first(file, how):
        if not swept:
            swept.append(file.name)
            os.unlink(file.name)
        lock(file, how)

    monkeypatch.setattr("operators.core.store.fcntl.flock", sweep_first)
    Store(tmp_path).save("a", make_operator())
    assert len(swept) == 1
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_file_system_without_locks_is_written_to_and_not_swept(make_operator, tmp_path, monkeypatch):
    def refuse(_file, _how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("operators.core.store.fcntl.flock", refuse)
    (tmp_path / LEFT).touch()
    Store(tmp_path).save("a", make_operator())
    assert sorted(os.listdir(tmp_path)) == [LEFT, "a.safetensors"]


def test_a_store_that_cannot_be_written_to_is_refused_before_there_is_anything_to_write(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError) as found:
        Store(tmp_path / "file" / "store").check_free("a")
    assert str(found.value) == (
        f"operator 'a' cannot be written to {tmp_path / 'file' / 'store'}: {tmp_path / 'file'} is not a directory"
    )
    assert Store(tmp_path / "not" / "yet").check_free("a") == tmp_path / "not" / "yet" / "a.safetensors"
    # The tests may run as somebody who may do anything.
    monkeypatch.setattr("operators.core.store.os.access", lambda place, _mode: place != tmp_path)
    with pytest.raises(StoreError, match=f"cannot be written to .*yet: no permission to write to {tmp_path}$"):
        Store(tmp_path / "not" / "yet").check_free("a")
