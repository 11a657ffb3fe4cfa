"""Every call of the contract, described once; the sync and the async client only carry them out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Generic, Literal, TypeVar

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from steering.v1 import generation_pb2 as pb
from steering.v1 import generation_pb2_grpc, operators_pb2_grpc
from steering.v1 import operators_pb2 as operators_pb

from steer_client import _decode as decode
from steer_client import _encode as encode
from steer_client import _results as results
from steer_client import _store as store
from steer_client._errors import InvalidRequestError
from steer_client._events import ComparisonReducer, GenerationReducer, Reducer
from steer_client._receipts import check_receipts
from steer_client._requests import OperatorUse, Prompt, SamplingParams

Item = TypeVar("Item")
Result = TypeVar("Result")

DEFAULT_TARGET: Final = "127.0.0.1:50051"
DEFAULT_TIMEOUT: Final = 120.0
#: The arm's name where a comparison is asked for with `operators` alone.
STEERED: Final = "steered"

_HOST_AND_PORT: Final = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[^\s:/]+):\d{1,5}")
# Names that gRPC resolves by other rules: unix:PATH, dns:///NAME, ...
_NAME_SCHEME: Final = re.compile(r"(unix|unix-abstract|vsock|dns|ipv4|ipv6|xds):.")
# Those that may stand for several servers, without rules of their own for them.
_MANY_SCHEME: Final = re.compile(r"(dns|ipv4|ipv6):")

# Log-probabilities make an answer longer than the 4 MiB that gRPC takes by default.
_ANY_LENGTH: Final = ("grpc.max_receive_message_length", -1)
# gRPC gives up a call's retry where the request is longer than this, 256 KiB by default: here the 16 MiB that a server
# takes at most, and its headers.
_RETRIED_LENGTH: Final = ("grpc.per_rpc_retry_buffer_size", 17 << 20)
# In turn, leaving out those that say that they do not serve. What a server did not begin to answer, because it stops
# or is gone, is asked of the next one, once: a request that kills servers must not go round all of them.
_IN_TURN: Final = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": ""},
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 2,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}


class Default(Enum):
    """Stands for the client's own timeout, because None means no timeout."""

    TIMEOUT = "the client's timeout"


CLIENT_TIMEOUT: Final = Default.TIMEOUT
Timeout = float | None | Literal[Default.TIMEOUT]


@dataclass(frozen=True, slots=True)
class Unary(Generic[Result]):
    """One request, one answer. `method` is a name on one of the Stubs."""

    service: Literal["generation", "operators", "health"]
    method: str
    request: Message
    decode: Callable[[Any], Result]


@dataclass(frozen=True, slots=True)
class Streaming(Generic[Item, Result]):
    """One request, many events."""

    method: str
    request: Message
    reducer: Reducer[Item, Result]


class Stubs:
    """The contract's services over one channel, sync or async."""

    def __init__(self, channel: grpc.Channel | grpc.aio.Channel) -> None:
        self._services: dict[str, Any] = {
            "generation": generation_pb2_grpc.GenerationServiceStub(channel),
            "operators": operators_pb2_grpc.OperatorServiceStub(channel),
            "health": health_pb2_grpc.HealthStub(channel),
        }

    def method(self, service: str, method: str) -> Any:
        """What carries out `method`, by its name in the contract."""
        return getattr(self._services[service], method)


def target_or_default(target: str | None) -> str:
    """The target as given, else STEER_TARGET, else this machine. Raises InvalidRequestError where it has no port."""
    found = target or os.environ.get("STEER_TARGET") or DEFAULT_TARGET
    # Without a port gRPC would take 443, and without a word.
    if not (_HOST_AND_PORT.fullmatch(found) or _NAME_SCHEME.match(found)):
        raise InvalidRequestError(
            f"target: {found!r} is not HOST:PORT, such as {DEFAULT_TARGET} or [::1]:50051, nor several servers, such "
            "as ipv4:10.0.0.1:50051,10.0.0.2:50051 or dns:///steer:50051",
            field="target",
        )
    return found


def is_many(target: str) -> bool:
    """Whether the target may stand for several servers: dns:///NAME:PORT, ipv4:HOST:PORT,HOST:PORT, or ipv6:."""
    return _MANY_SCHEME.match(target) is not None


def channel_options(target: str) -> tuple[tuple[str, Any], ...]:
    """gRPC's options for a channel to the target; several servers are asked in turn."""
    if not is_many(target):
        return (_ANY_LENGTH,)
    return (_ANY_LENGTH, _RETRIED_LENGTH, ("grpc.service_config", json.dumps(_IN_TURN)))


def generate(
    prompt: Prompt, operators: Sequence[OperatorUse], sampling: SamplingParams, request_id: str
) -> Unary[results.Generation]:
    """The answer is checked against the operators that were asked for."""
    uses = encode.uses(operators, "operators")
    request = encode.generate_request(prompt, uses, sampling, request_id)
    return Unary("generation", "Generate", request, lambda answer: check_receipts(uses, decode.generation(answer)))


def stream(
    prompt: Prompt, operators: Sequence[OperatorUse], sampling: SamplingParams, request_id: str
) -> Streaming[results.TextDelta, results.Generation]:
    """As generate, piece by piece."""
    uses = encode.uses(operators, "operators")
    request = encode.generate_request(prompt, uses, sampling, request_id)
    return Streaming("GenerateStream", request, GenerationReducer(uses))


def compare(
    prompt: Prompt,
    operators: Sequence[OperatorUse],
    arms: Mapping[str, Sequence[OperatorUse]] | None,
    sampling: SamplingParams,
    request_id: str,
    score: bool,
) -> Streaming[results.ArmDelta, results.ABResult]:
    """`operators` alone make one arm named "steered"."""
    if arms is None:
        operators = encode.uses(operators, "operators")
        if not operators:
            raise InvalidRequestError(
                "operators: a comparison needs at least one OperatorUse, or `arms` with some in each; a plain text "
                "alone is what `generate` gives",
                field="operators",
            )
        arms = {STEERED: operators}
    elif operators:
        raise InvalidRequestError("give `operators` for one steered arm, or `arms`, not both", field="arms")
    if not isinstance(arms, Mapping):
        raise InvalidRequestError("arms: a mapping from names to operators is needed", field="arms")
    every = {name: encode.uses(uses, f"arms[{i}].operators") for i, (name, uses) in enumerate(arms.items())}
    request = encode.compare_request(prompt, every, sampling, request_id, score)
    return Streaming("Compare", request, ComparisonReducer(every))


def list_operators() -> Unary[tuple[store.OperatorInfo, ...]]:
    """Every artifact in the store."""
    return Unary("operators", "ListOperators", operators_pb.ListOperatorsRequest(), decode.operator_list)


def get_operator(name: str) -> Unary[store.OperatorInfo]:
    """One artifact."""
    request = operators_pb.GetOperatorRequest(name=encode.name(name, "name"))
    return Unary("operators", "GetOperator", request, decode.one_operator)


def reload_operators(target: str) -> Unary[store.ReloadReport]:
    """Reads the store again. Raises InvalidRequestError for a target that may stand for several servers."""
    if is_many(target):
        raise InvalidRequestError(
            f"target: {target!r} may stand for several servers, of which one would reload; ask each by its HOST:PORT",
            field="target",
        )
    return Unary("operators", "ReloadOperators", operators_pb.ReloadOperatorsRequest(), decode.reload_report)


def model_info() -> Unary[results.ModelInfo]:
    """The model, its limits and its engine."""
    return Unary("generation", "GetModelInfo", pb.GetModelInfoRequest(), decode.model_info)


def tokenize(prompt: Prompt) -> Unary[results.Tokenization]:
    """A prompt as it reaches the model."""
    request = pb.TokenizeRequest(prompt=encode.prompt_message(prompt))
    return Unary("generation", "Tokenize", request, decode.tokenization)


def health() -> Unary[bool]:
    """The standard health service, for the server as a whole."""
    return Unary("health", "Check", health_pb2.HealthCheckRequest(), decode.healthy)
