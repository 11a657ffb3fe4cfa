"""Client of a steering server: text generation steered by detached-Jacobian operators.

    from steer_client import OperatorUse, SteerClient

    with SteerClient() as client:
        result = client.compare("My favourite place is", operators=[OperatorUse("golden-gate")])
        print(result.normal.text)
        print(result.steered["steered"].generation.text)

Every call raises a SteerError when it fails. No request is silently unsteered: a text comes back only with
the receipts of the operators that were asked for.
"""

from steer_client._aio import AsyncComparisonStream, AsyncGenerationStream, AsyncSteerClient
from steer_client._errors import (
    DeadlineExceededError,
    DoseTooHighError,
    EngineFailedError,
    InvalidRequestError,
    OperatorUnusableError,
    PromptTooLongError,
    ProtocolError,
    RequestCancelledError,
    ServerBusyError,
    ServerError,
    ServerUnavailableError,
    SteerError,
    SteeringNotAppliedError,
    UnknownOperatorError,
)
from steer_client._requests import Chat, ChatMessage, OperatorUse, Prompt, Rule, SamplingParams
from steer_client._results import (
    KL,
    ABResult,
    ArmDelta,
    ArmResult,
    FinishReason,
    Generation,
    ModelInfo,
    Receipt,
    TextDelta,
    Timings,
    Tokenization,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from steer_client._store import (
    Calibration,
    CalibrationPoint,
    ConceptText,
    LowRank,
    Member,
    OperatorInfo,
    ReloadReport,
)
from steer_client._sync import ComparisonStream, GenerationStream, SteerClient

__all__ = [
    "KL",
    "ABResult",
    "ArmDelta",
    "ArmResult",
    "AsyncComparisonStream",
    "AsyncGenerationStream",
    "AsyncSteerClient",
    "Calibration",
    "CalibrationPoint",
    "Chat",
    "ChatMessage",
    "ComparisonStream",
    "ConceptText",
    "DeadlineExceededError",
    "DoseTooHighError",
    "EngineFailedError",
    "FinishReason",
    "Generation",
    "GenerationStream",
    "InvalidRequestError",
    "LowRank",
    "Member",
    "ModelInfo",
    "OperatorInfo",
    "OperatorUnusableError",
    "OperatorUse",
    "Prompt",
    "PromptTooLongError",
    "ProtocolError",
    "Receipt",
    "ReloadReport",
    "RequestCancelledError",
    "Rule",
    "SamplingParams",
    "ServerBusyError",
    "ServerError",
    "ServerUnavailableError",
    "SteerClient",
    "SteerError",
    "SteeringNotAppliedError",
    "TextDelta",
    "Timings",
    "TokenLogprob",
    "Tokenization",
    "TopLogprob",
    "UnknownOperatorError",
    "Usage",
]
