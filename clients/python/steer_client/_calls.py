"""Every call of the contract: its request, and how its answer is read. Nothing is sent here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from steering.v1 import generation_pb2 as pb
from steering.v1 import operators_pb2 as operators_pb

from steer_client import _decode as decode
from steer_client import _encode as encode
from steer_client import _results as results
from steer_client import _store as store
from steer_client._channel import is_many
from steer_client._defaults import STEERED
from steer_client._errors import InvalidRequestError
from steer_client._events import ComparisonReducer, ComparisonsReducer, GenerationReducer, Reducer
from steer_client._receipts import check_receipts, check_score
from steer_client._requests import Arm, NamedArm, Operators, OperatorUse, Prompt, Prompts, SamplingParams, TokenReport

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Unary(Generic[Result]):
    """One request, one answer. `method` is its name in the contract's `service`."""

    service: Literal["generation", "operators", "admin", "health"]
    method: str
    #: Where the method takes a stream: its messages, which can be iterated over more than once.
    request: Message | Iterable[Message]
    decode: Callable[[Any], Result]

    @property
    def sent(self) -> Message | Iterator[Message]:
        """As gRPC takes it, for one attempt."""
        return self.request if isinstance(self.request, Message) else iter(self.request)


@dataclass(frozen=True, slots=True)
class Streaming(Generic[Item, Result]):
    """One request, many events."""

    method: str
    request: Message
    reducer: Reducer[Item, Result]
    service: Literal["generation", "admin"] = "generation"


def generate(
    prompt: Prompt, operators: Operators, sampling: SamplingParams, request_id: str
) -> Unary[results.Generation]:
    """A text of one prompt, checked against the operators that were requested."""
    uses = encode.uses(operators, "operators")
    request = encode.generate_request(prompt, uses, sampling, request_id)
    return Unary("generation", "Generate", request, lambda answer: check_receipts(uses, decode.generation(answer)))


def samples(
    prompt: Prompt, n: int, operators: Operators, sampling: SamplingParams, request_id: str
) -> Unary[tuple[results.Generation, ...]]:
    """Several texts of one prompt."""
    uses = encode.uses(operators, "operators")
    request = encode.generate_request(prompt, uses, sampling, request_id, n)
    return Unary(
        "generation",
        "Generate",
        request,
        lambda answer: tuple(check_receipts(uses, each) for each in decode.samples(answer, n)),
    )


def stream(
    prompt: Prompt, operators: Operators, sampling: SamplingParams, request_id: str
) -> Streaming[results.TextDelta, results.Generation]:
    """As generate, piece by piece."""
    uses = encode.uses(operators, "operators")
    request = encode.generate_request(prompt, uses, sampling, request_id)
    return Streaming("GenerateStream", request, GenerationReducer(uses))


def compare(
    prompt: Prompt,
    operators: Operators,
    arms: Mapping[str, Operators | Arm] | None,
    sampling: SamplingParams,
    request_id: str,
    *,
    score: bool = True,
    n: int = 1,
    normal: bool = True,
    report: TokenReport | None = None,
) -> Streaming[results.ArmDelta, results.ABResult]:
    """Texts of one prompt, the plain one and one per arm. `operators` make a single arm named "steered"."""
    named = _compared_arms(operators, arms)
    options: dict[str, Any] = {"score": score, "n": n, "normal": normal, "report": report}
    request = encode.compare_request(prompt, named, sampling, request_id, **options)
    return Streaming("Compare", request, ComparisonReducer(_uses_by_arm(named), n=n, normal=normal))


def compare_many(
    prompts: Prompts,
    operators: Operators,
    arms: Mapping[str, Operators | Arm] | None,
    sampling: SamplingParams,
    request_id: str,
    *,
    score: bool = True,
    n: int = 1,
    normal: bool = True,
    report: TokenReport | None = None,
) -> Streaming[results.ArmDelta | results.PromptResult, Mapping[str, results.ABResult]]:
    """As compare, of several prompts in one request."""
    named, by_id = _compared_arms(operators, arms), encode.prompts_by_id(prompts)
    if not by_id:
        raise InvalidRequestError("prompts: at least one is needed", field="prompts")
    options: dict[str, Any] = {"score": score, "n": n, "normal": normal, "report": report}
    request = encode.compare_many_request(by_id, named, sampling, request_id, **options)
    return Streaming("Compare", request, ComparisonsReducer(tuple(by_id), _uses_by_arm(named), n=n, normal=normal))


def _compared_arms(operators: Operators, arms: Mapping[str, Operators | Arm] | None) -> tuple[NamedArm, ...]:
    """As _arms. Raises InvalidRequestError where neither names any."""
    named = _arms(operators, arms)
    if not named and arms is None:
        raise InvalidRequestError(
            "operators: a comparison needs at least one OperatorUse, or `arms` with some in each; a plain text "
            "alone is what `generate` gives",
            field="operators",
        )
    return named


def score(
    text: str | Sequence[int],
    prompt: Prompt | None,
    operators: Operators,
    arms: Mapping[str, Operators | Arm] | None,
    report: TokenReport,
    request_id: str,
    time_limit: float | None,
) -> Unary[results.TextScore]:
    """A text under the plain model and one arm per name, checked against the operators that were requested."""
    named = _arms(operators, arms)
    request = encode.score_request(text, prompt, named, report, request_id, time_limit)
    uses = _uses_by_arm(named)
    return Unary("generation", "Score", request, lambda answer: check_score(uses, decode.text_score(answer)))


def _arms(operators: Operators, arms: Mapping[str, Operators | Arm] | None) -> tuple[NamedArm, ...]:
    """The arms beside the plain one: those of `arms`, or a single one named "steered", or none at all."""
    if arms is not None and operators:
        raise InvalidRequestError("give `operators` for one steered arm, or `arms`, not both", field="arms")
    if arms is not None:
        return encode.named_arms(arms)
    uses = encode.uses(operators, "operators")
    return (NamedArm(STEERED, uses),) if uses else ()


def _uses_by_arm(arms: Sequence[NamedArm]) -> dict[str, Sequence[OperatorUse]]:
    return {arm.name: arm.operators for arm in arms}


def list_operators() -> Unary[tuple[store.OperatorInfo, ...]]:
    """Every artifact in the store."""
    return Unary("operators", "ListOperators", operators_pb.ListOperatorsRequest(), decode.operator_list)


def get_operator(name: str) -> Unary[store.OperatorInfo]:
    """One artifact."""
    return Unary("operators", "GetOperator", encode.get_operator_request(name), decode.one_operator)


def reload_operators(target: str) -> Unary[store.ReloadReport]:
    """Reads the store again. Raises InvalidRequestError for a target that may stand for several servers."""
    refuse_many(target, "reload")
    return Unary("operators", "ReloadOperators", operators_pb.ReloadOperatorsRequest(), decode.reload_report)


def refuse_many(target: str, what: str) -> None:
    """Raises InvalidRequestError for a target that may stand for several servers: one of them would do it."""
    if is_many(target):
        raise InvalidRequestError(
            f"target: {target!r} may stand for several servers, of which one would {what}; ask each by its HOST:PORT",
            field="target",
        )


def model_info() -> Unary[results.ModelInfo]:
    """The model, its limits and its engine."""
    return Unary("generation", "GetModelInfo", pb.GetModelInfoRequest(), decode.model_info)


def tokenize(prompt: Prompt) -> Unary[results.Tokenization]:
    """A prompt as it reaches the model."""
    return Unary("generation", "Tokenize", encode.tokenize_request(prompt), decode.tokenization)


def health(probe: str = "") -> Unary[bool]:
    """The standard health service, for the server as a whole or one of its probes."""
    return Unary("health", "Check", health_pb2.HealthCheckRequest(service=probe), decode.healthy)
