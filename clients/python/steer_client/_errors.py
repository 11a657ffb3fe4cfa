"""Every way in which a call can fail.

SteerError
├── InvalidRequestError        the request is at fault; `.field` names the place
│   ├── PromptTooLongError     the prompt leaves no room in the model's context
│   ├── DoseTooHighError       the operators at one layer push more than the server admits
│   └── InsecureTokenError     the token would cross a network in plaintext; nothing was sent
├── UnauthenticatedError       the server asks for a token, or does not accept the one it got
├── PermissionDeniedError      the token is good, and does not allow this call or this operator
├── UnknownOperatorError       no such operator in the server's store
├── OperatorUnusableError      the operator in the store does not fit the model or cannot be read
│   └── DigestNotServedError   the server has another version of it than the one that was pinned
├── OperatorExistsError        the name is taken, and nothing says that it may be replaced
├── OperatorChangedError       the store has another version than the one that was expected
├── UnknownBuildError          the server knows no such build
├── BuildFailedError           a build failed or was cancelled; `.build` says how far it came
├── StoreFullError             the server's disk, or what uploads may take of it, has no room
├── ServerBusyError            the queue is full, or the token's rate used up; `.retry_after` in seconds
├── SteeringNotAppliedError    a text came back without proof of its steering
├── EngineFailedError          decoding failed
├── ServerUnavailableError     nobody answers at the target
│   └── TLSError               no TLS with whoever answers there
├── DeadlineExceededError      the call's own timeout ran out
├── RequestCancelledError      the call was cancelled before it ended
├── ControlChangedError        of a sweep, a text at strength 0 is not the plain one; `.result` has them all
├── ProtocolError              the answer does not follow the contract
└── ServerError                anything else that the server reports
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, TypedDict, Unpack

import grpc


class Status(TypedDict, total=False):
    """What the server reports of an error. What is absent takes the default of the error's class."""

    #: The gRPC status.
    code: grpc.StatusCode | None
    #: The stable name of the cause.
    reason: str
    #: More about the cause, by key.
    metadata: Mapping[str, str]


class SteerError(Exception):
    """Base of every error that a call raises. `str(error)` is one message for a person."""

    #: Code and reason of an error that is raised without a status from the server.
    default_code: ClassVar[grpc.StatusCode | None] = None
    default_reason: ClassVar[str] = ""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        #: The gRPC status; None where none applies.
        self.code = code or self.default_code
        #: The server's stable name for the cause, for example "UNKNOWN_OPERATOR"; may be empty.
        self.reason = reason or self.default_reason
        #: What the server says about the cause, by key.
        self.metadata: Mapping[str, str] = dict(metadata or {})


class InvalidRequestError(SteerError):
    """The request is at fault. `field` is the path in the request, for example "sampling.top_p"."""

    default_code = grpc.StatusCode.INVALID_ARGUMENT
    default_reason = "INVALID_REQUEST"

    def __init__(self, message: str, *, field: str = "", **status: Unpack[Status]) -> None:
        super().__init__(message, **status)
        self.field = field


class PromptTooLongError(InvalidRequestError):
    """The prompt, with room for an answer, exceeds the model's context."""

    default_reason = "PROMPT_TOO_LONG"


class DoseTooHighError(InvalidRequestError):
    """The strengths of the operators at one layer add up to more than twice the server's `max_dose`.

    `metadata` has the "layer", the "dose" that they add up to (half of a strength each), and "max_dose".
    """

    default_reason = "DOSE_TOO_HIGH"


class InsecureTokenError(InvalidRequestError):
    """A token was given for a server on another machine, without TLS. Nothing was sent."""

    default_reason = "INSECURE_TOKEN"


class UnauthenticatedError(SteerError):
    """The server asks for a token, or does not accept the one it got: unknown, or expired."""

    default_code = grpc.StatusCode.UNAUTHENTICATED
    default_reason = "UNAUTHENTICATED"


class PermissionDeniedError(SteerError):
    """The server knows the token, and its scopes or its operators do not allow this call."""

    default_code = grpc.StatusCode.PERMISSION_DENIED
    default_reason = "PERMISSION_DENIED"


class UnknownOperatorError(SteerError):
    """The server's store holds no operator of that name."""

    default_code = grpc.StatusCode.NOT_FOUND
    default_reason = "UNKNOWN_OPERATOR"


class OperatorUnusableError(SteerError):
    """The operator is in the store, but the server refuses to apply it."""

    default_code = grpc.StatusCode.FAILED_PRECONDITION
    default_reason = "OPERATOR_UNUSABLE"


class DigestNotServedError(OperatorUnusableError):
    """The server has another version of the operator. `metadata` has the digests "requested" and "served"."""

    default_reason = "DIGEST_NOT_SERVED"


class OperatorExistsError(SteerError):
    """The server's store has an operator of that name already. `metadata` has the digest "found"."""

    default_code = grpc.StatusCode.ALREADY_EXISTS
    default_reason = "OPERATOR_EXISTS"


class OperatorChangedError(SteerError):
    """The server's store has another version under that name. `metadata` has the digests "expected" and "found"."""

    default_code = grpc.StatusCode.FAILED_PRECONDITION
    default_reason = "OPERATOR_CHANGED"


class UnknownBuildError(SteerError):
    """The server knows no such build: it ended long ago, or before the server was started again."""

    default_code = grpc.StatusCode.NOT_FOUND
    default_reason = "UNKNOWN_BUILD"


class BuildFailedError(SteerError):
    """A build came to nothing. `build` is the OperatorBuild as it ended."""

    def __init__(self, message: str, *, build: object = None, **status: Unpack[Status]) -> None:
        super().__init__(message, **status)
        self.build = build


class StoreFullError(SteerError):
    """The server has no room for an operator; nothing of it was kept."""

    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "STORE_FULL"


class ServerBusyError(SteerError):
    """The server refuses for now: its queue is full, or the token's rate is used up (`reason` says which).

    `retry_after` is in seconds; None when the server gave none.
    """

    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "QUEUE_FULL"

    def __init__(self, message: str, *, retry_after: float | None = None, **status: Unpack[Status]) -> None:
        super().__init__(message, **status)
        self.retry_after = retry_after


class SteeringNotAppliedError(SteerError):
    """A text came back without proof that it was steered as requested."""

    default_code = grpc.StatusCode.INTERNAL
    default_reason = "STEERING_NOT_APPLIED"


class EngineFailedError(SteerError):
    """The server failed while decoding."""

    default_code = grpc.StatusCode.INTERNAL
    default_reason = "ENGINE_FAILED"


class ServerUnavailableError(SteerError):
    """Nobody answers at the target, or the server is going away.

    `is_unsent`: no connection could be made, so that the request has reached nobody.
    """

    default_code = grpc.StatusCode.UNAVAILABLE

    def __init__(self, message: str, *, is_unsent: bool = False, **status: Unpack[Status]) -> None:
        super().__init__(message, **status)
        self.is_unsent = is_unsent


class TLSError(ServerUnavailableError):
    """Somebody answers at the target, and TLS with them fails: an authority that is not trusted, an old certificate."""


class DeadlineExceededError(SteerError):
    """The call's timeout ran out."""

    default_code = grpc.StatusCode.DEADLINE_EXCEEDED


class RequestCancelledError(SteerError):
    """The call was cancelled, here or by the server, before it ended."""

    default_code = grpc.StatusCode.CANCELLED


class ProtocolError(SteerError):
    """The answer does not follow the contract, or follows a newer one than this client knows."""


class ServerError(SteerError):
    """The server reports a failure that has no type of its own."""
