"""Spans by OpenTelemetry: of both APIs, of batches and of flushes, in the traces of who asked; and nothing when off."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode

from service import traceparent
from service.domain import Busy
from service.scripts import Reply, Routed, Scripts
from service.tracing import Tracing
from service.web.traced import TracedApp, TracedScripts
from service.web.v1 import PATH
from service.web.v3 import ClientApi
from service.worker.flush import Flush, Flushed
from service.worker.traced import TracedFlush
from tests.calling import answer
from tests.scripting import NOTHING, request
from tests.unit.test_traceparent import GOOD, PARENT_ID, TRACE_ID
from tests.unit.test_v1_requests import ASKED, AUTHORIZATION, JSON_TYPE
from tests.unit.test_v3_requests import HEADERS, IDS, Reading, Tokens, V3Issuer
from tests.unit.test_v3_requests import PATH as PRODUCT_PATH


class Traced:
    """An application over a fake issuer, and the spans that it has ended."""

    def __init__(self, **provider: Any) -> None:
        self.exporter = InMemorySpanExporter()
        made = TracerProvider(**provider)
        made.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracing = Tracing(made)
        self.issuer = V3Issuer()
        api = ClientApi(self.issuer, Tokens(), Reading(), Reading(), IDS)
        self.app = TracedApp(self.tracing, self.issuer, api)

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())


@pytest.fixture
def traced() -> Traced:
    return Traced()


def ids_of(span: ReadableSpan) -> tuple[str, str]:
    context = span.get_span_context()
    assert context is not None
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


async def plain(traced: Traced, trace: str) -> int:
    """The status of a plain request, past ASGI."""
    body = json.dumps(ASKED).encode()
    headers = dict([JSON_TYPE, AUTHORIZATION, (b"content-length", b"%d" % len(body))])
    head = traced.app.head(PATH.encode(), headers)
    assert head is not None
    told: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    assert traced.app.begin(head, b"", body, told.set_result, trace)
    return int((await told).status)


class Anyone(V3Issuer):
    """Takes any credential, on both APIs."""

    async def issue(self, credential: str, request: Any) -> Any:
        self.asked.append(request)
        return self.outcome


@pytest.mark.parametrize("sent", ["", GOOD])
async def test_a_plain_request_is_a_span_in_the_trace_of_its_caller(traced: Traced, sent: str) -> None:
    issuer = traced.app._issuer = traced.issuer = Anyone()
    issuer.outcome = Busy("overloaded")
    assert await plain(traced, sent) == 503
    [span] = traced.spans
    assert (span.name, span.kind) == (f"POST {PATH}", SpanKind.SERVER)
    trace_id, span_id = ids_of(span)
    if sent:
        assert trace_id == TRACE_ID
        assert span.parent is not None and f"{span.parent.span_id:016x}" == PARENT_ID and span.parent.is_remote
    else:
        assert span.parent is None
    assert traceparent.ids(traced.issuer.asked[-1].trace) == (trace_id, span_id), "the ledger names the span"
    assert dict(span.attributes or {}) == {
        "http.request.method": "POST", "http.route": PATH, "http.response.status_code": 503,
        "voucherd.code": "overloaded", "voucherd.request_id": "req-1001",
    }  # fmt: skip
    assert span.status.status_code is StatusCode.ERROR


async def test_a_request_of_client_api_v3_is_a_span_without_the_name_of_a_single_thing(traced: Traced) -> None:
    headers = [*HEADERS, (b"traceparent", GOOD.encode())]
    seen = await answer(traced.app, "POST", PRODUCT_PATH, headers=headers, body=b'{"quantity": 2}')
    assert seen.status == 200
    [span] = traced.spans
    assert span.name == "POST /v3/products/{code}"
    assert ids_of(span)[0] == TRACE_ID
    assert traceparent.ids(traced.issuer.asked[-1].trace) == ids_of(span)
    codes = [voucher["voucher_code"] for voucher in json.loads(seen.body)["vouchers"]]
    assert len(codes) == 2 and not any(code in span.to_json() for code in codes)
    await answer(traced.app, "GET", "/v3/vouchers/a/b/c", headers=HEADERS, body=b"")
    await answer(traced.app, "GET", "/v3/anything", headers=HEADERS, body=b"")
    assert [one.name for one in traced.spans[1:]] == ["GET /v3/vouchers/{id}", "GET /v3/*"]


async def test_a_defect_ends_its_span_and_its_text_is_in_none(traced: Traced) -> None:
    traced.issuer.fault = RuntimeError("the code SPR-0001")
    seen = await answer(traced.app, "POST", PRODUCT_PATH, headers=HEADERS, body=b'{"quantity": 1}')
    assert seen.status == 500
    [span] = traced.spans
    assert span.status.status_code is StatusCode.ERROR
    assert "SPR-0001" not in span.to_json()


async def test_what_is_not_sampled_is_still_traced_into_the_ledger() -> None:
    traced = Traced(sampler=ALWAYS_OFF)
    headers = [*HEADERS, (b"traceparent", GOOD.encode())]
    assert (await answer(traced.app, "POST", PRODUCT_PATH, headers=headers, body=b'{"quantity": 1}')).status == 200
    assert traced.spans == []
    assert traceparent.ids(traced.issuer.asked[-1].trace)[0] == TRACE_ID
    assert traceparent.well_formed(traced.issuer.asked[-1].trace)


async def test_with_opentelemetry_off_by_its_own_variable_the_caller_s_trace_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    traced = Traced()
    headers = [*HEADERS, (b"traceparent", GOOD.encode())]
    for sent in (headers, HEADERS):
        assert (await answer(traced.app, "POST", PRODUCT_PATH, headers=sent, body=b'{"quantity": 1}')).status == 200
    kept = [one.trace for one in traced.issuer.asked]
    assert traceparent.ids(kept[0])[0] == TRACE_ID
    assert kept[1] == ""


async def test_a_batch_is_linked_to_each_of_its_requests(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    async def issue(self: Scripts, batch: Any, **_: Any) -> Reply:
        if len(batch) == 3:
            raise RuntimeError("the code SPR-0001")
        return Reply("OK", 1, 0, 0, [])

    monkeypatch.setattr(Scripts, "issue", issue)
    scripts = TracedScripts(traced.tracing, None)  # type: ignore[arg-type]  # nothing is sent
    batch = [Routed(request("a", trace=GOOD), NOTHING), Routed(request("b"), NOTHING)]
    await scripts.issue(batch, generation=1)
    with pytest.raises(RuntimeError):
        await scripts.issue([*batch, batch[0]], generation=1)
    done, failed = traced.spans
    assert (done.name, done.parent) == ("issue", None)
    assert [f"{link.context.trace_id:032x}" for link in done.links] == [TRACE_ID]
    assert (done.attributes or {})["voucherd.requests"] == 2
    assert (done.attributes or {})["voucherd.status"] == "OK"
    assert failed.status.status_code is StatusCode.ERROR
    assert "SPR-0001" not in failed.to_json()


async def test_a_flush_is_linked_to_what_it_wrote_and_nothing_to_flush_is_no_span(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def settle(self: Flush, generation: int, entries: Any) -> Flushed:
        return Flushed(len(entries), 5)

    monkeypatch.setattr(Flush, "settle", settle)
    flush = TracedFlush(traced.tracing, None, None, consumer="c", retention_s=60)
    await flush.settle(1, [])
    entries = [("1-0", {"traces": f"{GOOD}\x1e\x1ebad"}), ("2-0", {}), ("3-0", None), ("4-0", {"traces": GOOD})]
    await flush.settle(1, entries)
    [span] = traced.spans
    assert span.name == "flush"
    assert [f"{link.context.span_id:016x}" for link in span.links] == [PARENT_ID]
    assert dict(span.attributes or {}) == {
        "voucherd.entries": 4, "voucherd.generation": 1, "voucherd.codes": 5, "voucherd.incidents": 0,
    }  # fmt: skip


@pytest.fixture
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """A collector on loopback: where it is, and what it was sent."""
    received: list[ExportTraceServiceRequest] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Collector)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    yield f"http://127.0.0.1:{server.server_port}", received
    server.shutdown()
    serving.join()
    server.server_close()


async def test_spans_are_with_the_collector_that_the_environment_names(
    collector: tuple[str, list[ExportTraceServiceRequest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, received = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    tracing = Tracing.configured("serve")
    with tracing.step("issue", [GOOD], {}):
        pass
    await tracing.close()
    [resource] = received[0].resource_spans
    named = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert (named["service.name"], named["deployment.environment.name"]) == ("voucherd-serve", "test")
    [span] = resource.scope_spans[0].spans
    assert (span.name, span.links[0].trace_id.hex()) == ("issue", TRACE_ID)


async def test_the_name_that_the_environment_gives_the_service_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "vouchers")
    tracing = Tracing.configured("serve")
    assert tracing._provider.resource.attributes["service.name"] == "vouchers"
    await tracing.close()


WITHOUT = """
import sys
for name in ("opentelemetry", "opentelemetry.sdk", "opentelemetry.context"):
    sys.modules[name] = None
try:
    import service.tracing
except Exception as fault:
    print(type(fault).__name__, fault)
"""


def test_what_is_missing_is_said_with_what_to_do() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Misconfigured VOUCHERD_OTEL is set, and OpenTelemetry is not installed")
    assert "pip install 'voucherd[otel]'" in done.stdout


def test_nothing_of_opentelemetry_is_imported_unless_it_is_asked_for() -> None:
    for module in ("service.web.process", "service.worker.runner"):
        ours = "('service.tracing', 'opentelemetry.exporter')"  # redis-py imports the API where there is one
        loaded = f"import sys, {module}; print(*[name for name in sys.modules if name.startswith({ours})])"
        done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "", module
