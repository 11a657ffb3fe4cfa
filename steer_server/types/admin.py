"""What is asked of the store. ``rpc.admin_codec`` makes each from its message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from steer_server.types.limits import Bounded, Digest, NotEmpty, Range, check_fields

MAX_UPLOAD_ID = 64
MAX_CHUNK = 1 << 20
"""Bytes of a file in one message."""
ANY = "any"
"""Whatever version of an operator there is."""


@dataclass(frozen=True)
class UploadStart:
    """A file that is about to come, or to go on coming."""

    upload_id: Annotated[str, NotEmpty("an id is needed"), Bounded(max_characters=MAX_UPLOAD_ID)]
    name: str
    """What the operator is to be called."""
    size_bytes: Annotated[int, Range(1)]
    file_digest: Annotated[str, Digest()]
    """Of the whole file."""
    offset: Annotated[int, Range(0)] = 0
    """Where in the file the first chunk begins."""
    replace: str = ""
    """A digest or :data:`ANY`: what may be replaced. Empty: nothing."""

    def __post_init__(self) -> None:
        check_fields(self, "start")
