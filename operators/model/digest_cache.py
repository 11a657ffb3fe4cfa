"""The digests of checkpoints' weights, kept so that a second start does not read every number again.

An entry is believed only for files of the same paths, sizes, times of modification and of change, inodes and devices.
A cache that is damaged, of another version or cannot be written is as good as none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from dataclasses import astuple
from pathlib import Path

from operators.core.store import temporary_file
from operators.model.checkpoint_files import CheckpointFiles

_LOG = logging.getLogger(__name__)
_SCHEME = 2
"""Goes up with every change of what a digest is taken over."""
_SETTLED_NS = 2_000_000_000
"""A file that was changed later than this before it was read may be changed again without another time: a file
system's clock has ticks."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


def cached_digest(files: CheckpointFiles) -> str | None:
    """The weights' digest that was kept for exactly these files; None where there is none."""
    try:
        data = _entry(files).read_bytes()
        found = json.loads(data)
        if found["key"] == _key(files) and found["check"] == _check(found["key"], found["weights"]):
            return str(found["weights"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        _LOG.debug("the cached digest of %s is not used: %s", files.directory, error)
    return None


def keep_digest(files: CheckpointFiles, digest: str) -> None:
    """Keeps the weights' digest of these files, unless one of them was changed a moment ago."""
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"digest {digest!r} is no sha256")
    newest = max((max(stamp.modified_ns, stamp.changed_ns) for stamp in files.stamps), default=0)
    if newest > time.time_ns() - _SETTLED_NS:
        return
    entry, key = _entry(files), _key(files)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with temporary_file(entry.parent, entry.stem) as file:
            file.write(json.dumps({"key": key, "weights": digest, "check": _check(key, digest)}).encode())
            file.flush()
            os.replace(file.name, entry)
    except OSError as error:
        _LOG.debug("the digest of %s is not kept: %s", files.directory, error)


def _entry(files: CheckpointFiles) -> Path:
    from platformdirs import user_cache_path

    place = hashlib.sha256(os.fsencode(files.directory.absolute())).hexdigest()[:32]
    return user_cache_path("steering-operators") / "fingerprints" / f"{place}.json"


def _key(files: CheckpointFiles) -> str:
    """What an entry is good for: these files as they are, read by this version of transformers."""
    from transformers import __version__ as version

    stamps = [astuple(stamp) for stamp in files.stamps]
    return hashlib.sha256(json.dumps([_SCHEME, version, stamps]).encode()).hexdigest()


def _check(key: str, digest: str) -> str:
    """So that no damaged entry is believed."""
    return hashlib.sha256(f"{key} {digest}".encode()).hexdigest()
