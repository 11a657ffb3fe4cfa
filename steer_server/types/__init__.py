"""The nouns that pass between rooms. All frozen; validated where they are made.

Who fills what: ``rpc.codec`` makes :mod:`requests`; ``generate`` turns operators into a :class:`SteeringPlan` and a
request into a :class:`DecodeJob` (:mod:`jobs`); the engine answers with :data:`EngineEvent` (:mod:`events`);
``generate`` and ``compare`` gather those into :class:`Completion` and :class:`Comparison` (:mod:`results`).
"""

from steer_server.types.events import (
    Admitted,
    EngineEvent,
    FinishReason,
    Receipt,
    RowFinished,
    Score,
    TokenEvent,
    TokenLogprob,
    TopLogprob,
)
from steer_server.types.jobs import (
    Application,
    DecodeJob,
    Row,
    SteeringPlan,
)
from steer_server.types.requests import (
    DEFAULT_MAX_TOKENS,
    MAX_LOGPROBS,
    MAX_OPERATORS,
    NORMAL,
    Arm,
    ChatMessage,
    CompareRequest,
    GenerationRequest,
    OperatorUse,
    Prompt,
    SamplingParams,
    TokenizeRequest,
)
from steer_server.types.results import (
    ArmEvent,
    Compared,
    CompareEvent,
    Comparison,
    Completion,
    Delta,
    GenerateEvent,
    ModelInfo,
    Started,
    Timings,
    Tokenization,
    Usage,
)

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "MAX_LOGPROBS",
    "MAX_OPERATORS",
    "NORMAL",
    "Admitted",
    "Application",
    "Arm",
    "ArmEvent",
    "ChatMessage",
    "CompareEvent",
    "CompareRequest",
    "Compared",
    "Comparison",
    "Completion",
    "DecodeJob",
    "Delta",
    "EngineEvent",
    "FinishReason",
    "GenerateEvent",
    "GenerationRequest",
    "ModelInfo",
    "OperatorUse",
    "Prompt",
    "Receipt",
    "Row",
    "RowFinished",
    "SamplingParams",
    "Score",
    "Started",
    "SteeringPlan",
    "Timings",
    "TokenEvent",
    "TokenLogprob",
    "Tokenization",
    "TokenizeRequest",
    "TopLogprob",
    "Usage",
]
