"""Files that are too large, or no files at all: links, devices, pipes, directories."""

import os
import resource
import struct
import time

import pytest

from operators.core.artifact import read_artifact, to_bytes
from operators.core.errors import ArtifactError
from operators.core.file_format import MAX_BYTES, MAX_JSON_BYTES, read_file_header
from operators.core.store import Store


@pytest.fixture(scope="module")
def data(make_operator):
    return to_bytes(make_operator())


def test_a_header_longer_than_is_read_is_refused_without_being_read(tmp_path):
    path = tmp_path / "big.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_JSON_BYTES + 1))
        file.truncate(1 << 30)
    start = time.process_time()
    with pytest.raises(ArtifactError, match=f"takes {MAX_JSON_BYTES + 1} bytes; at most {MAX_JSON_BYTES}"):
        read_file_header(path)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'{"a": "' + b'\\"' * 500_000, "a string that does not end"),
        (b'{"a": ' + b'"\\' * 500_000, "a string that does not end"),
        (b'{"a": "' + b'\\"' * 500_000 + b'"}', "not a whole safetensors file"),
    ],
)
def test_a_header_of_escapes_is_refused_in_time_and_memory_of_its_length(text, problem, tmp_path):
    path = tmp_path / "escapes.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    start, used = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtifactError, match=problem):
        read_file_header(path)
    # Linear: some milliseconds. Looking for the end from each quote takes hours.
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 100 << 10


def test_an_oversized_file_is_refused_without_being_read(tmp_path):
    path = tmp_path / "big.safetensors"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    start = time.process_time()
    for read in (read_artifact, read_file_header):
        with pytest.raises(ArtifactError, match=rf"{MAX_BYTES + 1} bytes; at most {MAX_BYTES}"):
            read(path)
    assert time.process_time() - start < 1


def test_a_lower_limit_is_obeyed(data, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    assert read_artifact(path, max_bytes=len(data))
    with pytest.raises(ArtifactError, match=f"at most {len(data) - 1} are read"):
        read_artifact(path, max_bytes=len(data) - 1)


def test_reading_a_small_file_takes_no_memory_for_a_large_one(data, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    assert read_artifact(path, max_bytes=1 << 60)


def test_a_refused_file_is_closed(tmp_path):
    (tmp_path / "x.safetensors").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(ArtifactError):
            read_artifact(tmp_path / "x.safetensors")
    assert len(os.listdir("/proc/self/fd")) == before


def _symlink(path, data):
    (path.parent / "target").write_bytes(data)
    path.symlink_to(path.parent / "target")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (_symlink, "a symbolic link, which is not followed"),
        (lambda path, data: path.symlink_to("/nowhere"), "a symbolic link, which is not followed"),
        (lambda path, data: path.symlink_to("/dev/zero"), "a symbolic link, which is not followed"),
        (lambda path, data: path.mkdir(), "not a regular file"),
        (lambda path, data: os.mkfifo(path), "not a regular file"),
        (lambda path, data: None, "cannot be opened: No such file or directory"),
    ],
    ids=["symlink", "dangling symlink", "symlink to a device", "directory", "fifo", "nothing"],
)
@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_refused_without_waiting(place, words, data, tmp_path):
    path = tmp_path / "x.safetensors"
    place(path, data)
    for read in (read_artifact, read_file_header):
        with pytest.raises(ArtifactError, match=words):
            read(path)


def test_a_broken_operator_in_the_store_is_named_by_its_file(data, tmp_path):
    (tmp_path / "golden-gate.safetensors").write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match=r"^golden-gate\.safetensors: "):
        Store(tmp_path).load("golden-gate")
