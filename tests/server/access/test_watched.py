"""Files that change while the server runs: taken when they are whole, kept out when they cannot be used."""

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from steer_server.access.watched import Watched, watch
from steer_server.errors import StartupError


def number(data: bytes) -> int:
    return int(data)


def pair(left: bytes, right: bytes) -> bytes:
    if left != right:
        raise ValueError("they do not match")
    return left


def look_twice(file):
    file.look()
    file.look()


@pytest.fixture
def path(tmp_path):
    made = tmp_path / "file"
    made.write_text("1")
    return made


def test_new_content_is_taken_when_it_was_there_twice(path):
    file = Watched("number", [path], number)
    path.write_text("2")
    file.look()
    assert file.value == 1
    file.look()
    assert (file.value, file.problem, file.times_taken) == (2, "", 2)


def test_content_of_the_same_size_and_time_is_noticed(path):
    file = Watched("number", [path], number)
    before = path.stat()
    path.write_text("2")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    look_twice(file)
    assert file.value == 2


def test_what_cannot_be_used_is_said_and_what_there_was_stays(path):
    file = Watched("number", [path], number)
    path.write_text("x")
    look_twice(file)
    assert file.value == 1
    assert "invalid literal" in file.problem
    path.write_bytes(b"2" + b" " * (1 << 20))
    look_twice(file)
    assert "has more than 1048576 bytes" in file.problem
    path.unlink()
    look_twice(file)
    assert file.value == 1
    assert "No such file" in file.problem
    path.write_text("1")
    look_twice(file)
    assert (file.value, file.problem, file.times_taken) == (1, "", 1)


def test_a_link_that_is_moved_is_a_change(tmp_path):
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "data").symlink_to("1")
    file = Watched("number", [tmp_path / "data" / "file"], number)
    (tmp_path / "next").symlink_to("2")
    (tmp_path / "next").rename(tmp_path / "data")
    look_twice(file)
    assert file.value == 2


def test_of_two_files_neither_is_taken_before_the_other_matches(tmp_path):
    paths = [tmp_path / "left", tmp_path / "right"]
    for each in paths:
        each.write_text("1")
    file = Watched("pair", paths, pair)
    paths[0].write_text("2")
    look_twice(file)
    assert (file.value, file.problem) == (b"1", "they do not match")
    paths[1].write_text("2")
    look_twice(file)
    assert (file.value, file.problem) == (b"2", "")


@pytest.mark.parametrize("content", [None, "x"])
def test_what_cannot_be_used_at_the_start_is_an_error_with_its_path(tmp_path, content):
    path = tmp_path / "file"
    if content is not None:
        path.write_text(content)
    with pytest.raises(StartupError, match=f"number {path} cannot be used: "):
        Watched("number", [path], number)


async def test_files_are_looked_at_while_all_other_threads_are_taken(path):
    file, hangs = Watched("number", [path], number), threading.Event()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    taken = asyncio.ensure_future(asyncio.to_thread(hangs.wait))
    ticks = []
    watching = asyncio.ensure_future(watch([file], lambda: ticks.append(1)))
    path.write_bytes(b"8")
    async with asyncio.timeout(10):
        while file.value != 8:
            await asyncio.sleep(0.02)
    assert ticks
    watching.cancel()
    hangs.set()
    await taken


async def test_a_file_whose_disk_hangs_holds_up_no_other(path, tmp_path, monkeypatch):
    (tmp_path / "far").write_text("1")
    far, near, hangs = Watched("far", [tmp_path / "far"], number), Watched("near", [path], number), threading.Event()
    monkeypatch.setattr(far, "look", hangs.wait)
    watching = asyncio.ensure_future(watch([far, near]))
    path.write_text("2")
    try:
        async with asyncio.timeout(5):
            while near.value != 2:
                await asyncio.sleep(0.02)
    finally:
        watching.cancel()
        hangs.set()
