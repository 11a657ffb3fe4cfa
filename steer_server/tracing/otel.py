"""Spans of calls and of their texts. The only module that imports OpenTelemetry, loaded where that is asked for.

A call is one span, in the context that the client sent. Each of its texts is a span within it, with a child for what it
waited in the queue, for the reading of its prompt, and for its decoding. A thread sends them; what finds no room in its
queue is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, format_trace_id
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from operators.core.version import __version__
from steer_server.tracing import names
from steer_server.tracing.base import NO_TRACE, Attribute, CallTrace, Ending, Headers
from steer_server.tracing.texts import CallTexts, TracedText
from steer_server.types import CompareEvent, CompareRequest, GenerateEvent, GenerationRequest, ScoreEvent, ScoreRequest

SERVICE = "steer-server"
"""The service's name where OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say nothing."""
MAX_TEXT_SPANS = 64
"""Texts of a call with spans of their own."""
_PROVIDER = "steering-operators"
_NANOSECONDS = 1e9
_CONTEXT = TraceContextTextMapPropagator()
_CONTEXT_HEADERS = ("traceparent", "tracestate")


class OtelTracing:
    """Implements :class:`steer_server.tracing.base.Tracing`."""

    def __init__(self, model: str, processor: SpanProcessor) -> None:
        """``model``: the name of the one that is served. Sampling and resource are those of the environment's OTEL_…"""
        # They would write into the log what clients send as context.
        logging.getLogger("opentelemetry.trace").setLevel(logging.ERROR)
        ours = Resource({"service.name": SERVICE, "service.version": __version__})
        resource = Resource.get_empty().merge(ours).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("steer_server", __version__)
        self._model = model

    def begin(self, name: str, attributes: Mapping[str, Attribute], headers: Callable[[], Headers]) -> CallTrace:
        """See :meth:`steer_server.tracing.base.Tracing.begin`."""
        carrier: dict[str, list[str]] = {}
        for key, value in headers():
            if key in _CONTEXT_HEADERS and isinstance(value, str):
                carrier.setdefault(key, []).append(value)
        parent = _CONTEXT.extract(carrier, Context())
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, attributes)
        return _OtelCall(self._tracer, span, self._model) if span.is_recording() else NO_TRACE

    async def close(self, seconds: float) -> None:
        """See :meth:`steer_server.tracing.base.Tracing.close`."""
        # It may wait for long for one who does not answer, whatever it is told.
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, seconds)


class _OtelCall:
    """Implements :class:`steer_server.tracing.base.CallTrace`."""

    def __init__(self, tracer: Tracer, span: Span, model: str) -> None:
        self._tracer, self._span, self._model = tracer, span, model
        self._context = trace.set_span_in_context(span, Context())
        self._texts = CallTexts()
        self._request_id = ""
        self._num_spans = 0
        self._clock = time.time_ns() - time.monotonic_ns()
        """From the monotonic clock to that of spans."""

    @property
    def trace_id(self) -> str:
        """See :attr:`steer_server.tracing.base.CallTrace.trace_id`."""
        return format_trace_id(self._span.get_span_context().trace_id)

    def asked(self, request: GenerationRequest | CompareRequest | ScoreRequest) -> None:
        """See :meth:`steer_server.tracing.base.CallTrace.asked`."""
        self._request_id = request.request_id
        self._span.set_attribute(names.REQUEST_ID, request.request_id)
        self._texts.asked(request)

    def see(self, event: GenerateEvent | CompareEvent | ScoreEvent) -> None:
        """See :meth:`steer_server.tracing.base.CallTrace.see`."""
        for text in self._texts.see(event):
            self._write(text, None)

    def end(self, ending: Ending) -> None:
        """See :meth:`steer_server.tracing.base.CallTrace.end`."""
        for text in self._texts.unfinished():
            self._write(text, ending)
        if self._texts.count:
            self._span.set_attribute(names.TEXTS, self._texts.count)
        self._span.set_attributes(ending.attributes)
        _note_error(self._span, ending)
        self._span.end()

    def _write(self, text: TracedText, ending: Ending | None) -> None:
        """``ending``: of the call, where the text ended with it."""
        if self._num_spans >= MAX_TEXT_SPANS:
            return
        self._num_spans += 1
        timings = text.timings
        attributes: dict[str, Attribute] = {
            names.GEN_AI_OPERATION: text.operation,
            names.GEN_AI_PROVIDER: _PROVIDER,
            names.GEN_AI_REQUEST_MODEL: self._model,
            names.GEN_AI_RESPONSE_ID: self._request_id,
            **text.attributes,
        }
        began = None if timings is None else self._nanoseconds(timings.began)
        name = f"{text.operation} {self._model}"
        span = self._tracer.start_span(name, self._context, SpanKind.INTERNAL, attributes, start_time=began)
        if timings is None:
            if ending is not None:
                _note_error(span, ending)
            span.end()
            return
        within = trace.set_span_in_context(span, Context())
        read = timings.total if timings.time_to_first_token is None else timings.time_to_first_token
        steps = {"queue": (0.0, timings.queued), "prefill": (timings.queued, read), "decode": (read, timings.total)}
        for step, (start, end) in steps.items():
            if end > start:
                start_time = self._nanoseconds(timings.began + start)
                child = self._tracer.start_span(step, within, SpanKind.INTERNAL, start_time=start_time)
                child.end(self._nanoseconds(timings.began + end))
        span.end(self._nanoseconds(timings.began + timings.total))

    def _nanoseconds(self, at: float) -> int:
        return int(at * _NANOSECONDS) + self._clock


def _note_error(span: Span, ending: Ending) -> None:
    if ending.error_type:
        span.set_attribute(names.ERROR_TYPE, ending.error_type)
    if ending.is_fault:
        span.set_status(Status(StatusCode.ERROR, ending.problem))
