"""Protobuf to results.

Raises ProtocolError for an answer that lacks what the contract promises, or that speaks of something this
client does not know: guessing would turn a newer server's answer into a wrong one.
"""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from steering.convert import FieldError, Reader, reader
from steering.v1 import comparison_pb2, score_pb2, text_pb2
from steering.v1 import generation_pb2 as pb
from steering.v1 import operator_admin_pb2 as admin
from steering.v1 import operators_pb2 as operators
from steering.v1 import steering_pb2 as sp

from steer_client import _admin as asked
from steer_client import _results as results
from steer_client import _store as store
from steer_client._errors import ProtocolError

_T = TypeVar("_T")

_read_generation = reader(text_pb2.GenerateResponse, results.Generation, strict=True)
_read_delta = reader(text_pb2.Delta, results.TextDelta, strict=True)
_read_arm_result = reader(comparison_pb2.Comparison, results.ArmResult, strict=True)
_read_text_score = reader(score_pb2.ScoreResponse, results.TextScore, strict=True)
_read_tokenization = reader(pb.TokenizeResponse, results.Tokenization, strict=True)
_read_model_info = reader(pb.GetModelInfoResponse, results.ModelInfo, strict=True)
_read_operator = reader(operators.Operator, store.OperatorInfo, strict=True)
_read_build = reader(admin.OperatorBuild, asked.OperatorBuild, strict=True)
_read_reload_report = reader(operators.ReloadOperatorsResponse, store.ReloadReport, strict=True)


def generation(message: text_pb2.GenerateResponse) -> results.Generation:
    """A finished text."""
    return _decode(_read_generation, message)


def samples(message: text_pb2.GenerateResponse, n: int) -> tuple[results.Generation, ...]:
    """The texts of an answer with several. Raises ProtocolError for another number of them."""
    found = tuple(generation(each) for each in (message, *message.more))
    if [each.sample for each in found] != list(range(n)):
        raise ProtocolError(f"the server sent the samples {[each.sample for each in found]}; asked for were {n}")
    return found


def delta(message: text_pb2.Delta) -> results.TextDelta:
    """The next piece of a text."""
    return _decode(_read_delta, message)


def arm_result(message: comparison_pb2.Comparison, steered: results.Generation) -> results.ArmResult:
    """One comparison; `steered` is the text that its arm finished with."""
    kl = None
    if message.HasField("kl_mean"):
        p95 = message.kl_p95 if message.HasField("kl_p95") else None
        kl = results.KL(message.kl_mean, p95, tuple(message.kl_per_token))
    elif message.kl_per_token:
        raise _lacks(message, "kl_mean")
    return _decode(_read_arm_result, message, generation=steered, kl=kl)


def text_score(message: score_pb2.ScoreResponse) -> results.TextScore:
    """A text under every arm. Each must have every token of it."""
    for arm in message.arms:
        if [each.token_id for each in arm.tokens] != list(message.token_ids):
            raise ProtocolError(f"the server's score of arm {arm.arm!r} is not of the tokens of the text")
    return _decode(_read_text_score, message)


def operator_info(message: operators.Operator) -> store.OperatorInfo:
    """An artifact; one that cannot be used may lack anything but its name."""
    info = _decode(_read_operator, message)
    if info.usable and info.recommended_rule is None:
        raise _unknown(message, "recommended_rule", message.recommended_rule)
    return info


def operator_list(message: operators.ListOperatorsResponse) -> tuple[store.OperatorInfo, ...]:
    """The store, in the server's order."""
    return tuple(operator_info(each) for each in message.operators)


def one_operator(
    message: operators.GetOperatorResponse
    | admin.UploadOperatorResponse
    | admin.LoadOperatorResponse
    | admin.UnloadOperatorResponse,
) -> store.OperatorInfo:
    """The answer to a request about one name."""
    if not message.HasField("operator"):
        raise _lacks(message, "operator")
    return operator_info(message.operator)


def build(message: admin.OperatorBuild) -> asked.OperatorBuild:
    """A build, with what it has built."""
    if message.HasField("operator"):
        operator_info(message.operator)
    return _decode(_read_build, message)


def reload_report(message: operators.ReloadOperatorsResponse) -> store.ReloadReport:
    """What a reload changed."""
    return _decode(_read_reload_report, message)


def tokenization(message: pb.TokenizeResponse) -> results.Tokenization:
    """Token ids and their texts, one for one."""
    if len(message.token_ids) != len(message.tokens):
        raise ProtocolError(f"the server tokenized to {len(message.token_ids)} ids but {len(message.tokens)} texts")
    return _decode(_read_tokenization, message)


def model_info(message: pb.GetModelInfoResponse) -> results.ModelInfo:
    """The model, its limits and its engine."""
    return _decode(_read_model_info, message)


def healthy(message: health_pb2.HealthCheckResponse) -> bool:
    """Whether the server takes requests."""
    return bool(message.status == health_pb2.HealthCheckResponse.SERVING)


def _decode(read: Reader[_T], message: Message, **given: object) -> _T:
    try:
        return read(message, **given)
    except FieldError as error:
        field = error.path.rsplit(".", 1)[-1]
        where = error.message or message
        raise _lacks(where, field) if error.number is None else _unknown(where, field, error.number) from None


def _lacks(message: Message, field: str) -> ProtocolError:
    return ProtocolError(f"the server's {message.DESCRIPTOR.name} lacks `{field}`")


def _unknown(message: Message, field: str, number: int) -> ProtocolError:
    what = field.replace("_", " ")
    if isinstance(message, sp.Receipt):
        what += f" in the receipt of {message.operator!r}"
    elif isinstance(message, operators.Operator):
        what += f" of {message.name!r}"
    if number == 0:
        return ProtocolError(f"the server gave no {what}")
    return ProtocolError(f"the server gave a {what} that this client does not know ({number}): update the client")
