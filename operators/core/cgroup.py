"""What a container's control group leaves of the memory, in both versions of Linux's control groups."""

from __future__ import annotations

import re
from pathlib import Path

_MOUNT, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def memory_left(mount: Path = _MOUNT, membership: Path = _MEMBERSHIP) -> int | None:
    """Bytes that this process may still take by the tightest limit of its group and of those around it.

    None where there is no limit. Pages of files that can be dropped do not count as taken.
    """
    found = []
    for directory, limit, usage, inactive in _hierarchies(mount, membership):
        # A container often sees its own group as the root, and its path as it is outside: what is missing is skipped.
        for group in (directory, *directory.parents):
            if group != mount and mount not in group.parents:
                break
            most, taken = _number(group / limit), _number(group / usage)
            if most is not None and taken is not None:
                found.append(max(0, most - max(0, taken - _stat(group / "memory.stat", inactive))))
    return min(found, default=None)


def _hierarchies(mount: Path, membership: Path) -> list[tuple[Path, str, str, str]]:
    """The group's directory in each hierarchy that limits memory, and the names of its files there."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found.append((mount / path.lstrip("/"), "memory.max", "memory.current", "inactive_file"))
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            found.append((mount / "memory" / path.lstrip("/"), *names))
    return found


def _number(file: Path) -> int | None:
    """What the file says; None for "max", for nothing, and where there is no such file."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isascii() and text.isdecimal() else None


def _stat(file: Path, name: str) -> int:
    try:
        found = re.search(rf"^{name} (\d+)$", file.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0
