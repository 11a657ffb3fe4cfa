"""The errors that a request can meet, as a tree. ``rpc/status.py`` maps each to a gRPC status, the SDK to an exception.

SteerServerError
├── InvalidRequestError         the caller's fault; names the field
│   ├── PromptTooLongError          prompt does not fit the context
│   └── DoseTooHighError            the doses at one layer add up to more than the server admits
├── UnknownOperatorError        no such operator in the store
├── OperatorUnusableError       it is in the store and cannot be used: damaged, or for another model
│   └── DigestNotServedError        the request pins another version of it
├── QueueFullError              no room while others wait and run; says when to try again
├── UnauthenticatedError        the server asks for tokens, and none that it knows came with the call
├── PermissionDeniedError       the token does not allow this call, or this operator
├── RateLimitedError            the token's calls or tokens of this minute are used up; says when to try again
├── SteeringNotAppliedError     a plan could not be applied in full, so there is no result
├── StoreUnreadableError        the store cannot be read again
├── StoreUnwritableError        the store cannot be written to
├── StoreFullError              there is no room for what is to be stored
├── OperatorExistsError         the name is taken, and nothing says that it may be replaced
├── OperatorChangedError        the store has another version than the one that the request expects
├── UnknownUploadError          no such upload is unfinished
├── UnknownBuildError           no such build waits or runs, or is remembered
├── UploadOffsetError           an upload goes on elsewhere than where it was left
├── EngineFailedError           the engine broke while it worked on this request
├── TimeLimitError              the time limit ran out, and half a result is none
├── RequestIncompleteError      the client took too long to send its request
├── SlowReaderError             the client took too long to read its answer
├── LoadingError                the server does not serve yet; says when to try again
├── ShuttingDownError           the server is stopping
└── UnimplementedError          a method that this server does not offer

StartupError                    the server cannot start (never on the wire)
EngineDiedError                 the server cannot go on (never on the wire; running requests meet EngineFailedError)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager


class SteerServerError(Exception):
    """Base of every error that a request can meet."""


class InvalidRequestError(SteerServerError):
    """A field of the request has a value that is not accepted."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field, self._problem = field, problem

    def move(self, field: str, note: str = "") -> None:
        """Names another field: the one that has the value in the request as it was sent. ``note`` ends the message."""
        self.field, self._problem = field, self._problem + note
        self.args = (f"{field}: {self._problem}",)


@contextmanager
def errors_of(field: str, *, at: str) -> Iterator[None]:
    """An :class:`InvalidRequestError` of ``field``, or of a part of it, names ``at`` in its place."""
    try:
        yield
    except InvalidRequestError as error:
        rest = error.field.removeprefix(field)
        if error.field.startswith(field) and rest[:1] in ("", ".", "["):
            error.move(at + rest)
        raise


class PromptTooLongError(InvalidRequestError):
    """The prompt leaves no room in the model's context."""

    def __init__(self, tokens: int, context_length: int, *, more: bool = False, unit: str = "tokens") -> None:
        """``more``: that many were counted, and there may be more. ``unit``: what was counted, tokens or not."""
        found = f"has {tokens} {unit}{' or more' if more else ''}"
        accepted = f"this model takes at most {context_length - 1} tokens, to leave room for one more"
        super().__init__("prompt", f"{found}; {accepted}")


class DoseTooHighError(InvalidRequestError):
    """The strengths of the operators at one layer add up to more than the server admits: twice its largest dose."""

    def __init__(self, field: str, *, layer: int, dose: float, max_dose: float, parts: tuple[str, ...]) -> None:
        """``parts``: each operator of that layer with its strength, in words: the message speaks of strengths."""
        super().__init__(
            field,
            f"the strengths at layer {layer} add up to {2.0 * dose:.12g}; at most {2.0 * max_dose:.12g} is accepted "
            f"({', '.join(parts)}): their sizes count, and the bound is twice the server's --max-dose {max_dose:.12g}",
        )
        self.layer, self.dose, self.max_dose = layer, dose, max_dose


class UnknownOperatorError(SteerServerError):
    """No operator of that name is in the store."""

    def __init__(self, name: str, known: tuple[str, ...], *, has_words: bool = False) -> None:
        """``has_words``: it was named for words, or by default, by somebody who may know of no lens."""
        names = ", ".join(known) if known else "none"
        hint = "; words need a lens, which `steer-operators lens` builds" if has_words else ""
        super().__init__(
            f"no operator {name!r} has been read from the store; there are: {names} "
            f"(steer operators --reload reads new ones){hint}"
        )
        self.name = name


class OperatorUnusableError(SteerServerError):
    """The operator is in the store and cannot be used."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"operator {name!r} cannot be used: {problem}")
        self.name = name


class DigestNotServedError(OperatorUnusableError):
    """The version that the request pins is not the one that this server has under that name."""

    def __init__(self, name: str, *, requested: str, served: str) -> None:
        super().__init__(name, f"{requested} is asked for, and this server has {served} under that name")
        self.requested, self.served = requested, served


class QueueFullError(SteerServerError):
    """There is no room now: too many requests wait, or running ones hold the memory for operators."""

    def __init__(self, problem: str, retry_after: float) -> None:
        """``retry_after``: seconds."""
        super().__init__(f"{problem}; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class UnauthenticatedError(SteerServerError):
    """No token that is accepted came with the call."""

    def __init__(self, problem: str, *, cause: str) -> None:
        """``cause``: one of few, for metrics and the audit log; here and in the next two."""
        super().__init__(problem)
        self.cause = cause


class PermissionDeniedError(SteerServerError):
    """The caller is known, and may not do this."""

    def __init__(self, problem: str, *, cause: str) -> None:
        super().__init__(problem)
        self.cause = cause


class RateLimitedError(SteerServerError):
    """The token has used up what it may ask for in a minute."""

    def __init__(self, problem: str, retry_after: float, *, cause: str) -> None:
        """``retry_after``: seconds."""
        super().__init__(f"{problem}; try again in {math.ceil(retry_after)} s")
        self.retry_after, self.cause = retry_after, cause


ACCESS_ERRORS = (UnauthenticatedError, PermissionDeniedError, RateLimitedError)
"""What :mod:`steer_server.access` refuses. Each has a ``cause``."""


class SteeringNotAppliedError(SteerServerError):
    """Steering could not be applied at every step, so the text is withheld."""


class StoreUnreadableError(SteerServerError):
    """The store cannot be read; the operators of the last reading stay."""


class StoreUnwritableError(SteerServerError):
    """The store cannot be written to; it is as it was."""


class StoreFullError(SteerServerError):
    """The disk, what uploads may take of it, or what may be in service has no room for it; nothing of it is kept."""


class OperatorExistsError(SteerServerError):
    """The name is taken, and the request does not say what it may replace."""

    def __init__(self, name: str, found: str) -> None:
        """``found``: the digest of what has the name; empty where its file does not say."""
        super().__init__(
            f"operator {name!r} is in the store already ({found or 'a damaged file'}); `replace` with its digest, or "
            "'any', replaces it"
        )
        self.name, self.found = name, found


class OperatorChangedError(SteerServerError):
    """The store has another version under the name than the one that the request expects."""

    def __init__(self, name: str, *, expected: str, found: str) -> None:
        super().__init__(
            f"operator {name!r} in the store is {found or 'a damaged file'}, and {expected} is expected; nothing was "
            "changed"
        )
        self.name, self.expected, self.found = name, expected, found


class UnknownUploadError(SteerServerError):
    """No upload of that id is unfinished."""

    def __init__(self, upload_id: str) -> None:
        super().__init__(
            f"no upload {upload_id!r} is unfinished; it ended, or was given up, or began at another server"
        )


class UnknownBuildError(SteerServerError):
    """No build of that id waits, runs or is remembered."""

    def __init__(self, build_id: str) -> None:
        super().__init__(
            f"no build {build_id!r} is known; ListBuilds has those that wait and run, and the last that ended"
        )


class UploadOffsetError(SteerServerError):
    """What is sent of an upload does not begin where that stands."""

    def __init__(self, problem: str, *, received: int) -> None:
        """``received``: bytes that are held."""
        super().__init__(problem)
        self.received = received


class EngineFailedError(SteerServerError):
    """The engine failed on this request."""


class TimeLimitError(SteerServerError):
    """The time limit ran out before there was a result."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"time_limit: {seconds:g} s ran out before every token of the text had its score")


class RequestIncompleteError(SteerServerError):
    """The client opened a call and did not send its request in time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the request did not arrive within {seconds:g} s of the call's beginning")


class SlowReaderError(SteerServerError):
    """The client does not take its answer, which waits in the server's memory; the rest is not decoded."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no more of the answer could be sent for {seconds:g} s, because the client did not read it")


class LoadingError(SteerServerError):
    """The server has not loaded its model yet."""

    retry_after = 5.0
    """Seconds."""

    def __init__(self) -> None:
        super().__init__(f"the server is loading its model; try again in {self.retry_after:.0f} s")


class ShuttingDownError(SteerServerError):
    """The server is stopping and takes no more requests."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class UnimplementedError(SteerServerError):
    """A method of a service that is offered here, and that is not."""

    def __init__(self, method: str) -> None:
        super().__init__(f"{method} is not offered by this server")


class StartupError(Exception):
    """The server cannot start; the message says why."""


class EngineDiedError(Exception):
    """The engine can decode nothing any more; the process ends."""
