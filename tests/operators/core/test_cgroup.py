import pytest
import torch

from operators.core import capacity
from operators.core.cgroup import memory_left

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path):
    """``machine(membership, {path: text})``: what a process sees of its control groups."""

    def make(membership, files):
        for path, text in files.items():
            (tmp_path / "fs" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "fs" / path).write_text(f"{text}\n")
        (tmp_path / "self").write_text(membership)
        return tmp_path / "fs", tmp_path / "self"

    return make


def _v1(path, limit, usage, inactive=0):
    folder = f"memory{path}"
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": usage,
        f"{folder}/memory.stat": f"cache 7\ntotal_inactive_file {inactive}",
    }


def _v2(path, limit, usage, inactive=0):
    return {
        f"{path}memory.max": limit,
        f"{path}memory.current": usage,
        f"{path}memory.stat": f"anon 7\ninactive_file {inactive}\n",
    }


@pytest.mark.parametrize(
    ("membership", "files", "left"),
    [
        # Version 2: a group of its own, its parent's tighter limit, a container that is the root, and no limit.
        ("0::/a/b\n", _v2("a/b/", 4 * GIB, GIB), 3 * GIB),
        ("0::/a/b\n", _v2("a/b/", 4 * GIB, GIB) | _v2("a/", 2 * GIB, GIB), GIB),
        ("0::/docker/abc\n", _v2("", 2 * GIB, GIB, inactive=GIB // 2), GIB + GIB // 2),
        ("0::/\n", _v2("", 2 * GIB, 3 * GIB), 0),
        ("0::/\n", _v2("", "max", GIB), None),
        # Version 1: beside other controllers, in a container, and its number for no limit.
        ("5:cpu,cpuacct:/x\n4:memory:/x\n0::/\n", _v1("/x", 4 * GIB, GIB), 3 * GIB),
        ("4:memory:/docker/abc\n", _v1("", 2 * GIB, GIB, inactive=GIB), 2 * GIB),
        ("4:memory:/\n", _v1("", 9223372036854771712, 0), 9223372036854771712),
        # No control groups, or files that say nothing.
        ("", {}, None),
        ("4:memory:/x\n", {"memory/x/memory.limit_in_bytes": "", "memory/x/memory.usage_in_bytes": ""}, None),
    ],
)
def test_the_tightest_limit_counts(machine, membership, files, left):
    assert memory_left(*machine(membership, files)) == left


def test_no_control_groups_are_no_limit(tmp_path):
    assert memory_left(tmp_path, tmp_path / "none") is None


def test_a_build_may_use_what_its_container_leaves(monkeypatch):
    monkeypatch.setattr(capacity, "memory_left", lambda: 1000)
    assert capacity.free_memory(torch.device("cpu")) == 800
