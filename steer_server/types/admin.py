"""What is asked of the store. ``rpc.admin_codec`` makes each from its message."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Literal

from operators.core.header import MAX_TEXTS, MAX_WORDS, SETTING_FIELDS, Anchor, FirstToken, Rule
from operators.core.positions import Positions
from operators.core.vector_source import MAX_WORD
from steer_server.errors import InvalidRequestError
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


MAX_TEXT = 4096
"""Characters of one of the texts of a build."""
BuildState = Literal["waiting", "running", "succeeded", "failed", "cancelled"]


@dataclass(frozen=True)
class BuildRequest:
    """What to build, for the model being served. None takes the default of ``steer-operators build``."""

    name: str
    texts: Annotated[
        tuple[str, ...],
        NotEmpty("at least one text is needed"),
        Bounded(max_items=MAX_TEXTS, min_characters=1, max_characters=MAX_TEXT, items="texts"),
    ]
    words: Annotated[
        tuple[str, ...], Bounded(max_items=MAX_WORDS, min_characters=1, max_characters=MAX_WORD, items="words")
    ] = ()
    layer: Annotated[int | None, Range(1)] = None
    rank: Annotated[int | None, Range(1)] = None
    exact: bool = False
    """In place of a rank, as is a tolerance."""
    tolerance: Annotated[float | None, Range(above=0.0, maximum=0.99)] = None
    strength: Annotated[float | None, Range(accepted="a finite number")] = None
    rule: Rule | None = None
    blend: Annotated[float | None, Range(0.0, 1.0)] = None
    positions: Positions | None = None
    anchor: Anchor | None = None
    first_token: FirstToken | None = None
    calibrate: bool = False
    quick: bool = False
    """Of the calibration."""
    replace: str = ""
    """See :class:`UploadStart`."""

    def __post_init__(self) -> None:
        check_fields(self)
        sizes = [name for name in ("rank", "exact", "tolerance") if getattr(self, name) not in (None, False)]
        if len(sizes) > 1:
            raise InvalidRequestError(sizes[1], f"is there beside {sizes[0]}; one of the two is accepted")
        if self.quick and not self.calibrate:
            raise InvalidRequestError("quick", "is of a calibration, which is not asked for")
        if self.calibrate and not self.words:
            raise InvalidRequestError("words", "is empty; a calibration needs what shows the concept in a text")
        given = [name for name in SETTING_FIELDS if getattr(self, name) is not None]
        if self.calibrate and given:
            raise InvalidRequestError(given[0], "is given; a calibration finds it, so one of the two is accepted")


@dataclass(frozen=True)
class OperatorBuild:
    """A job that builds an operator, as it is at one moment. Filled by ``admin.builds``."""

    id: str
    name: str
    state: BuildState
    stage: str = ""
    done: int = 0
    total: int = 0
    time_left: float | None = None
    """Seconds, of the stage."""
    last_line: str = ""
    problem: str = ""
    caller: str = ""
    created: datetime | None = None
    started: datetime | None = None
    ended: datetime | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it will change any more."""
        return self.state not in ("waiting", "running")
