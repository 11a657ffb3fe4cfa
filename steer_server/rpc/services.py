"""The two services of the contract, each method a few lines: decode, call, encode."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

import grpc
from steering.v1 import comparison_pb2, generation_pb2_grpc, operators_pb2_grpc, score_pb2, text_pb2
from steering.v1 import generation_pb2 as pb
from steering.v1 import operators_pb2 as ops

from operators.core.version import __version__
from steer_server.caller import CALLER
from steer_server.caps import Caps
from steer_server.compare import compare
from steer_server.config import ServerConfig
from steer_server.engine.base import Engine
from steer_server.errors import EngineFailedError, InvalidRequestError
from steer_server.generate import generate
from steer_server.metrics import Metrics
from steer_server.registry import Registry
from steer_server.rpc import codec
from steer_server.rpc.call_record import current_call
from steer_server.rpc.operator_codec import operator, store_changes
from steer_server.rpc.shared_run import SharedRun
from steer_server.score import score
from steer_server.types import (
    CompareEvent,
    CompareRequest,
    Completion,
    GenerateEvent,
    GenerationRequest,
    RequestLimits,
    ScoreEvent,
    ScoreRequest,
    TextScore,
    Tokenization,
)

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Event = TypeVar("_Event", bound=GenerateEvent | CompareEvent | ScoreEvent)


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """See ``steering.v1.GenerationService``."""

    def __init__(
        self, engine: Engine, registry: Registry, metrics: Metrics, config: ServerConfig, limits: RequestLimits
    ) -> None:
        self._engine, self._registry, self._metrics, self._config = engine, registry, metrics, config
        self._caps = Caps(config.max_tokens, config.max_total_tokens, config.max_time, 1 + config.max_arms)
        caps = self._caps
        self._limits = replace(
            limits, max_tokens=caps.max_tokens, max_total_tokens=caps.max_total_tokens, max_time=caps.max_time
        )

    async def Generate(self, request: pb.GenerateRequest, context: _Context) -> text_pb2.GenerateResponse:
        """One answer."""
        asked = codec.generation_request(request)
        if not asked.repeat_in_finished:
            raise InvalidRequestError("repeat_in_finished", "is false; an answer without deltas repeats nothing")
        async with aclosing(
            self._observed(asked, generate(self._engine, self._registry, asked, caps=self._caps))
        ) as events:
            texts = [event async for event in events if isinstance(event, Completion)]
        if len(texts) != asked.n:
            raise EngineFailedError("the engine ended without a result")
        return codec.completion(*sorted(texts, key=lambda text: text.sample))

    async def GenerateStream(self, request: pb.GenerateRequest, context: _Context) -> AsyncIterator[pb.GenerateEvent]:
        """Token by token."""
        asked = codec.generation_request(request)
        async with aclosing(
            self._observed(asked, generate(self._engine, self._registry, asked, caps=self._caps))
        ) as events:
            async for event in events:
                yield codec.generate_event(event, repeats=asked.repeat_in_finished)

    async def Compare(
        self, request: comparison_pb2.CompareRequest, context: _Context
    ) -> AsyncIterator[comparison_pb2.CompareEvent]:
        """Arm by arm, token by token."""
        asked = codec.compare_request(request)
        compared = compare(self._engine, self._registry, asked, max_arms=self._config.max_arms, caps=self._caps)
        async with aclosing(self._observed(asked, compared)) as events:
            async for event in events:
                yield codec.compare_event(event, repeats=asked.repeat_in_finished)

    async def Score(self, request: score_pb2.ScoreRequest, context: _Context) -> score_pb2.ScoreResponse:
        """One answer, once every arm has read the text."""
        asked = codec.score_request(request)
        scored = score(self._engine, self._registry, asked, max_arms=self._config.max_arms, caps=self._caps)
        async with aclosing(self._observed(asked, scored)) as events:
            async for event in events:
                if isinstance(event, TextScore):
                    return codec.text_score(event)
        raise EngineFailedError("the engine ended without a result")

    async def _observed(
        self, asked: GenerationRequest | CompareRequest | ScoreRequest, events: AsyncGenerator[_Event, None]
    ) -> AsyncGenerator[_Event, None]:
        """The events, as metrics, the log and traces see them too."""
        record, counted = current_call(), self._metrics.follow()
        charge = CALLER.get().grant.charge
        record.request_id = asked.request_id
        record.trace.asked(asked)
        try:
            async with aclosing(events):
                async for event in events:
                    record.see(event)
                    counted.see(event)
                    yield event
        finally:
            charge.settle()

    async def Tokenize(self, request: pb.TokenizeRequest, context: _Context) -> pb.TokenizeResponse:
        """Prompt to token ids."""
        ids = await self._engine.encode(codec.prompt(request.prompt))
        return codec.tokenization(Tokenization(ids, await self._engine.token_texts(ids)))

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: _Context) -> pb.GetModelInfoResponse:
        """The model and the limits."""
        return codec.model_info(
            self._engine.model,
            version=__version__,
            max_queue=self._config.max_queue,
            max_arms=self._config.max_arms,
            max_dose=self._config.max_dose,
            operator_admin=self._config.operator_admin,
            limits=self._limits,
        )


class OperatorService(operators_pb2_grpc.OperatorServiceServicer):
    """See ``steering.v1.OperatorService``."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._reloads = SharedRun(registry.reload)

    async def ListOperators(self, request: ops.ListOperatorsRequest, context: _Context) -> ops.ListOperatorsResponse:
        """All of the snapshot."""
        return ops.ListOperatorsResponse(operators=map(operator, self._registry.entries()))

    async def GetOperator(self, request: ops.GetOperatorRequest, context: _Context) -> ops.GetOperatorResponse:
        """One by name."""
        return ops.GetOperatorResponse(operator=operator(self._registry.entry(request.name)))

    async def ReloadOperators(
        self, request: ops.ReloadOperatorsRequest, context: _Context
    ) -> ops.ReloadOperatorsResponse:
        """Reads the store again, beside the event loop: hashing gigabytes takes a while."""
        return store_changes(await self._reloads.run())
