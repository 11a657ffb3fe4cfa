import grpc
import pytest
import steer_client
from steer_client import (
    DeadlineExceededError,
    DigestNotServedError,
    DoseTooHighError,
    EngineFailedError,
    InvalidRequestError,
    OperatorChangedError,
    OperatorExistsError,
    OperatorUnusableError,
    PermissionDeniedError,
    PromptTooLongError,
    RequestCancelledError,
    ServerBusyError,
    ServerError,
    ServerUnavailableError,
    SteerError,
    SteeringNotAppliedError,
    StoreFullError,
    UnauthenticatedError,
    UnknownBuildError,
    UnknownOperatorError,
)

C = grpc.StatusCode
TABLE = [
    (C.INVALID_ARGUMENT, "INVALID_REQUEST", InvalidRequestError),
    (C.INVALID_ARGUMENT, "PROMPT_TOO_LONG", PromptTooLongError),
    (C.INVALID_ARGUMENT, "DOSE_TOO_HIGH", DoseTooHighError),
    (C.NOT_FOUND, "UNKNOWN_OPERATOR", UnknownOperatorError),
    (C.FAILED_PRECONDITION, "OPERATOR_UNUSABLE", OperatorUnusableError),
    (C.FAILED_PRECONDITION, "DIGEST_NOT_SERVED", DigestNotServedError),
    (C.ALREADY_EXISTS, "OPERATOR_EXISTS", OperatorExistsError),
    (C.FAILED_PRECONDITION, "OPERATOR_CHANGED", OperatorChangedError),
    (C.NOT_FOUND, "UNKNOWN_BUILD", UnknownBuildError),
    (C.RESOURCE_EXHAUSTED, "STORE_FULL", StoreFullError),
    (C.RESOURCE_EXHAUSTED, "QUEUE_FULL", ServerBusyError),
    (C.PERMISSION_DENIED, "SCOPE_MISSING", PermissionDeniedError),
    (C.INTERNAL, "STEERING_NOT_APPLIED", SteeringNotAppliedError),
    (C.INTERNAL, "ENGINE_FAILED", EngineFailedError),
    (C.UNAVAILABLE, "SHUTTING_DOWN", ServerUnavailableError),
    (C.DEADLINE_EXCEEDED, "TOO_SLOW", DeadlineExceededError),
    (C.CANCELLED, "STOPPED", RequestCancelledError),
    (C.INTERNAL, "SOMETHING_NEW", ServerError),
    (C.DATA_LOSS, "SOMETHING_NEW", ServerError),
]
BARE = [
    (C.INVALID_ARGUMENT, InvalidRequestError),
    (C.NOT_FOUND, UnknownOperatorError),
    (C.FAILED_PRECONDITION, OperatorUnusableError),
    (C.RESOURCE_EXHAUSTED, ServerBusyError),
    (C.UNAUTHENTICATED, UnauthenticatedError),
    (C.PERMISSION_DENIED, PermissionDeniedError),
    (C.INTERNAL, ServerError),
    (C.UNAVAILABLE, ServerUnavailableError),
    (C.DEADLINE_EXCEEDED, DeadlineExceededError),
    (C.CANCELLED, RequestCancelledError),
    (C.UNIMPLEMENTED, ServerError),
    (C.UNKNOWN, ServerError),
]


@pytest.mark.parametrize(("code", "reason", "kind"), TABLE, ids=lambda value: str(value))
def test_a_status_with_a_reason_becomes_its_exception(fake, make, any_call, code, reason, kind):
    fake.fault = make.fault(code, "said plainly", reason, {"operator": "x"})
    with pytest.raises(SteerError) as caught:
        any_call(fake.target)
    error = caught.value
    assert type(error) is kind
    assert error.code is code
    assert error.reason == reason
    assert error.metadata == {"operator": "x"}
    assert str(error) == error.message == "said plainly"


@pytest.mark.parametrize(("code", "kind"), BARE, ids=lambda value: str(value))
def test_a_status_without_details_is_known_by_its_code(fake, make, generate, code, kind):
    fake.fault = make.fault(code)
    with pytest.raises(SteerError) as caught:
        generate(fake.target)
    assert type(caught.value) is kind
    assert caught.value.code is code
    assert caught.value.metadata == {}


def test_the_field_at_fault_is_named(fake, make, any_call):
    fake.fault = make.fault(C.INVALID_ARGUMENT, reason="INVALID_REQUEST", field_name="sampling.top_p")
    with pytest.raises(InvalidRequestError) as caught:
        any_call(fake.target)
    assert caught.value.field == "sampling.top_p"


def test_a_busy_server_says_when_to_come_back(fake, make, any_call):
    fake.fault = make.fault(C.RESOURCE_EXHAUSTED, reason="QUEUE_FULL", retry_after=2.5)
    with pytest.raises(ServerBusyError) as caught:
        any_call(fake.target)
    assert caught.value.retry_after == 2.5


def test_a_busy_server_may_not_say_when(fake, make, client):
    fake.fault = make.fault(C.RESOURCE_EXHAUSTED, reason="QUEUE_FULL")
    with pytest.raises(ServerBusyError) as caught:
        client.generate("hello")
    assert caught.value.retry_after is None


def test_a_reason_of_another_domain_is_not_taken_for_ours(fake, make, client):
    fake.fault = make.fault(C.INTERNAL, reason="STEERING_NOT_APPLIED", domain="proxy.example")
    with pytest.raises(ServerError) as caught:
        client.generate("hello")
    assert caught.value.reason == ""


def test_every_exception_of_the_package_is_a_steer_error():
    kinds = [getattr(steer_client, name) for name in steer_client.__all__ if name.endswith("Error")]
    assert len(kinds) == 25
    assert all(issubclass(kind, SteerError) for kind in kinds)


def test_an_unreachable_target_is_named_with_what_to_do(any_call):
    with pytest.raises(ServerUnavailableError, match=r"127\.0\.0\.1:1\b.*is steer-server running there\?"):
        any_call("127.0.0.1:1")


def test_a_deadline_ends_the_call_on_the_server_too(fake, any_call):
    fake.hang_after = 1
    with pytest.raises(DeadlineExceededError, match=r"did not finish the request within 0\.2 s"):
        any_call(fake.target, timeout=0.2)
    # On a slow machine the time can run out before the request gets there.
    assert not fake.requests or fake.left.wait(5)
