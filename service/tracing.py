"""OpenTelemetry, where it is asked for: spans that begin in another process's trace, and end with what was answered.

Nobody imports this file unless VOUCHERD_OTEL is set: without it no request meets a line of it.  Exporter, sampler,
resource and bounds are set by OpenTelemetry's own OTEL_… variables.  No attribute holds a code, a token or the text of
an exception.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from service import __version__, traceparent
from service.errors import Misconfigured

try:
    from opentelemetry.context import Context
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import (
        Link,
        NonRecordingSpan,
        Span,
        SpanContext,
        SpanKind,
        Status,
        StatusCode,
        TraceFlags,
        set_span_in_context,
    )
except ImportError as missing:
    raise Misconfigured(
        f"VOUCHERD_OTEL is set, and OpenTelemetry is not installed ({missing.name}): pip install 'voucherd[otel]'"
    ) from None

# A collector that does not answer must not keep a process from ending: what it has not taken by then is dropped.
SHUTDOWN_S: Final = 2.0

# Traces that one span names; OpenTelemetry keeps no more by itself.
LINKS_MAX: Final = 128

Attributes = Mapping[str, str | int | bool]


class Tracing:
    """The spans of one process."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("voucherd", __version__)

    @classmethod
    def configured(cls, process: str) -> Tracing:
        """Spans go by OTLP over HTTP to where the OTEL_EXPORTER_OTLP_… variables say, in a thread of their own."""
        resource = Resource.create({"service.version": __version__, "process.pid": os.getpid()})
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # OTEL_SERVICE_NAME is not set
            resource = resource.merge(Resource({SERVICE_NAME: f"voucherd-{process}"}))
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider)

    async def close(self) -> None:
        """What was recorded is with the collector, if it takes it within SHUTDOWN_S."""
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        await asyncio.to_thread(ending.join, SHUTDOWN_S)

    def request(self, name: str, trace: str, attributes: Attributes) -> Span:
        """A span, which the caller ends, of a request that came with the traceparent ``trace``; of none for ''."""
        parent = Context() if not trace else set_span_in_context(NonRecordingSpan(_context(trace)), Context())
        return self._tracer.start_span(name, parent, SpanKind.SERVER, attributes)

    @contextmanager
    def step(self, name: str, traces: Iterable[str], attributes: Attributes) -> Iterator[Span]:
        """A span of what is done for many requests at once: in a trace of its own, with a link to each of theirs.

        Ended with the body; failed if that raises.
        """
        named = list(dict.fromkeys(trace for trace in traces if trace))[:LINKS_MAX]
        links = [Link(_context(trace)) for trace in named]
        span = self._tracer.start_span(name, Context(), SpanKind.CLIENT, attributes, links)
        try:
            yield span
        except BaseException as fault:
            failed(span, fault)
            raise
        finally:
            span.end()


def failed(span: Span, fault: BaseException) -> None:
    """``fault`` is what came of it: by its type alone, for its text may hold a code."""
    span.set_status(Status(StatusCode.ERROR, type(fault).__name__))


def trace_of(span: Span) -> str:
    """The traceparent of what is done within ``span``; '' if OpenTelemetry makes none (OTEL_SDK_DISABLED)."""
    context = span.get_span_context()
    if not context.is_valid:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def _context(trace: str) -> SpanContext:
    trace_id, parent_id = traceparent.ids(trace)
    return SpanContext(
        int(trace_id, 16), int(parent_id, 16), is_remote=True, trace_flags=TraceFlags(int(trace[53:], 16))
    )
