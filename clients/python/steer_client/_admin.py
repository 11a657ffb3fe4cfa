"""What is asked of a server's store and said of its builds, and the file that an upload sends."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Literal

from steer_client._errors import InvalidRequestError
from steer_client._positions import Positions
from steer_client._requests import Anchor, FirstToken, Rule
from steer_client._store import OperatorInfo

#: Bytes of a file in one message: at most 1 MiB is accepted.
CHUNK = 256 << 10
_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class UploadStart:
    """What an upload begins with; see the contract."""

    upload_id: str
    name: str
    size_bytes: int
    file_digest: str
    offset: int
    replace: str


@dataclass(frozen=True, slots=True)
class OperatorName:
    """The one operator that a request is about."""

    name: str


@dataclass(frozen=True, slots=True)
class DeleteOperatorRequest:
    """An operator, and the digest that it is to have."""

    name: str
    digest: str


@dataclass(frozen=True, slots=True)
class GetUploadRequest:
    """The id that an upload was begun with."""

    upload_id: str


@dataclass(frozen=True, slots=True)
class BuildOperatorRequest:
    """What to build. What is None takes the default of `steer-operators build`."""

    name: str
    texts: Sequence[str]
    words: Sequence[str]
    layer: int | None
    rank: int | None
    exact: bool
    tolerance: float | None
    strength: float | None
    rule: Rule | None
    blend: float | None
    positions: Positions | None
    anchor: Anchor | None
    first_token: FirstToken | None
    calibrate: bool
    quick: bool
    replace: str


@dataclass(frozen=True, slots=True)
class BuildId:
    """The one build that a request is about."""

    id: str


BuildState = Literal["waiting", "running", "succeeded", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class OperatorBuild:
    """A job that builds an operator at the server, as it was at one moment."""

    id: str
    #: Of the operator.
    name: str
    state: BuildState
    #: What was being done, how much of it was done, and how much there is; 0 of 0 where it is not counted.
    stage: str
    done: int
    total: int
    #: Seconds until the end of the stage by its pace so far; None where that is not known.
    time_left: float | None
    #: What the build said last, beside its progress.
    last_line: str
    #: Why it failed; empty elsewhere.
    problem: str
    #: Who asked for it.
    caller: str
    #: In UTC.
    created: datetime | None
    started: datetime | None
    ended: datetime | None
    #: What was built, once it has succeeded.
    operator: OperatorInfo | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it will change any more."""
        return self.state not in ("waiting", "running")


@dataclass(frozen=True, slots=True)
class OperatorFile:
    """A file that is to be sent. `progress` is called with the bytes that have been sent and those of the file."""

    path: Path
    name: str
    size_bytes: int
    file_digest: str
    progress: Callable[[int, int], object] | None

    @property
    def upload_id(self) -> str:
        """The same for the same file under the same name, so that a process that was started again goes on."""
        return hashlib.sha256(f"{self.name}\n{self.file_digest}".encode()).hexdigest()


def operator_file(
    path: str | PathLike[str], name: str | None, progress: Callable[[int, int], object] | None
) -> OperatorFile:
    """Reads a file once for its digest. Raises InvalidRequestError where it cannot be read."""
    file = Path(path)
    try:
        with open(file, "rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
            size = opened.tell()
    except OSError as error:
        raise InvalidRequestError(f"path: {file} cannot be read: {error.strerror}", field="path") from error
    if name is None:
        # The name that a store gave it, where it is a store's.
        name = re.sub(f"{re.escape(_SUFFIX)}$", "", file.name)
    return OperatorFile(file, name, size, f"sha256:{digest}", progress)
