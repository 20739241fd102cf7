"""``python -m deploy.grafana.dashboard > deploy/grafana/voucherd.json``: the dashboard, from the instruments.

A panel asks for an instrument of ``service.metrics`` by its Python name, so one that is renamed or gone stops the
generator, not the dashboard.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from prometheus_client import Histogram
from prometheus_client.metrics import MetricWrapperBase

from service import metrics
from service.metrics import Build, Supervision

SCHEMA: Final = 39  # of Grafana 11; later ones read it
WIDTH: Final = 24  # columns of Grafana's grid
HEIGHT: Final = 8  # rows of one panel

# Grafana puts in what suits the span and the scrape interval.
OVER: Final = "[$__rate_interval]"

# Answers that were no voucher; 207-762 is a part of those that were asked for, of Client API v3.
REFUSED: Final = 'code!~"issued|replayed|207-762"'


class Panel(NamedTuple):
    """One graph.  ``unit`` is Grafana's name of one; ``queries``: expression and legend each."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    about: str
    width: int = 8


class Section(NamedTuple):
    """A row of panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


def sections() -> tuple[Section, ...]:
    """What the dashboard shows, in its order."""
    total, batch = _name(metrics.requests), _base(metrics.batch_requests)
    campaigns, distributors = _name(metrics.campaign_requests), _name(metrics.distributor_requests)
    workers, ready, exits, resident = (metric.name for metric in Supervision(0).collect())
    (build,) = (metric.name for metric in Build().collect())
    return (
        Section("Traffic", (
            Panel("Answers", "reqps", ((f"sum by (code) (rate({total}{OVER}))", "{{code}}"),),
                  "Requests a second by what they were answered."),
            Panel("Vouchers", "cps", (
                (f"sum(rate({_name(metrics.vouchers_issued)}{OVER}))", "issued"),
                (f"sum(rate({_name(metrics.replays)}{OVER}))", "replayed"),
            ), "Vouchers issued to new requests, and requests answered from their record."),
            Panel("Server errors", "percentunit", (
                (f'sum(rate({total}{{status=~"5.."}}{OVER})) / sum(rate({total}{OVER})) or vector(0)', "5xx"),
            ), "The objective is at most 0.1 % in 30 days."),
        )),
        Section("Latency", (
            Panel("Request", "s", tuple(_quantiles(metrics.request_seconds)),
                  "From the moment a request is taken up to its answer. The objective: 99 % within 0.1 s."),
            Panel("Issue script", "s", tuple(_quantiles(metrics.script_seconds, '{script="issue"}')),
                  "One call of Redis as the serving process saw it."),
            Panel("Batches", "short", (
                (f"sum(rate({batch}_sum{OVER})) / sum(rate({batch}_count{OVER}))", "requests a batch"),
                (f"sum({_name(metrics.queue)})", "vouchers waiting"),
            ), "Batches grow with load; what waits is bounded by VOUCHERD_QUEUE_MAX in each process."),
        )),
        Section("Refusals", (
            Panel("By campaign", "reqps", (
                (f'topk(10, sum by (campaign, code) (rate({campaigns}{{{REFUSED}}}{OVER})))',
                 "{{campaign}} {{code}}"),
            ), "The ten that refuse most, by the campaign that was considered first.", 6),
            Panel("By distributor", "reqps", (
                (f'topk(10, sum by (distributor, code) (rate({distributors}{{{REFUSED}}}{OVER})))',
                 "{{distributor}} {{code}}"),
            ), "The ten that are refused most; only those whose credential was confirmed.", 6),
            Panel("By guard", "reqps", (
                (f"sum by (guard) (rate({_name(metrics.guard_refusals)}{OVER}))", "{{guard}}"),
            ), "For the sake of other requests: over a distributor's limit (429), more than can be taken (503).", 6),
            Panel("Credentials", "reqps", (
                (f"sum by (api, code) (rate({_name(metrics.credentials_refused)}{OVER}))", "{{api}} {{code}}"),
                (f"sum(rate({_name(metrics.requests_malformed)}{OVER})) or vector(0)", "malformed HTTP"),
            ), "Tokens and secrets that were refused, and what was no HTTP.", 6),
        )),
        Section("Stock", (
            Panel("Seconds to empty", "s", (
                (f"bottomk(10, min by (pool) ({_name(metrics.pool_empty_in_seconds)}))", "{{pool}}"),
            ), "The ten that are empty first, at the burn rate of the last minute; infinite while nothing is issued."),
            Panel("Stored", "short", (
                (f"bottomk(10, max by (pool) ({_name(metrics.stock_codes)}))", "{{pool}}"),
            ), "Codes in the store, not leased to a window yet; the ten pools that have fewest."),
            Panel("Windows and quarantine", "short", (
                (f"bottomk(10, min by (pool) ({_name(metrics.window_codes)}))", "{{pool}} in its window"),
                (f"sum({_name(metrics.quarantined_codes)}) or vector(0)", "in quarantine"),
            ), "Codes ready to issue, of the ten shortest windows; and those that a generation left behind."),
            Panel("Issued by campaign", "cps", (
                (f"topk(10, sum by (campaign) (rate({_name(metrics.campaign_vouchers_issued)}{OVER})))",
                 "{{campaign}}"),
            ), "The ten that issue most.", 12),
            Panel("Refill", "s", (
                *_quantiles(metrics.lease_seconds, legend="lease"),
                *_quantiles(metrics.refill_seconds, legend="refill"),
            ), "Leasing in the store, and all of the way until the codes are in a window.", 12),
        )),
        Section("Ledger", (
            Panel("Outbox", "short", (
                (f"max by (partition) ({_name(metrics.outbox_codes)})", "codes in partition {{partition}}"),
                (f"min({_name(metrics.outbox_limit_codes)})", "at most"),
            ), "Vouchers that are not in the ledger yet.", 6),
            Panel("Outbox, bytes", "bytes", (
                (f"max by (partition) ({_name(metrics.outbox_bytes)})", "in partition {{partition}}"),
                (f"min({_name(metrics.outbox_limit_bytes)})", "at most"),
            ), "At its bound nothing new is issued.", 6),
            Panel("Lag", "s", (
                (f"max by (partition) ({_name(metrics.outbox_age_seconds)})", "oldest now"),
                *_quantiles(metrics.flush_lag_seconds, legend="flushed after"),
            ), "How long vouchers wait for the ledger.", 6),
            Panel("Flush", "cps", (
                (f"sum(rate({_name(metrics.flushed)}{OVER}))", "codes a second"),
            ), "Codes written to the ledger.", 6),
            Panel("Books", "short", (
                (f"max by (books) ({_name(metrics.conservation_difference)})", "{{books}} differ"),
                (f"sum by (kind) ({_name(metrics.incidents)})", "incidents: {{kind}}"),
                (f"sum({_name(metrics.parked)})", "parked entries"),
                (f"max({_name(metrics.store_older)})", "store is older"),
            ), "All of it stays 0.", 12),
            Panel("Catalogue", "short", (
                (f"max({_name(metrics.catalogue_stored)})", "in the store"),
                (f"min({_name(metrics.fence_version)})", "in force"),
                (f"min({_name(metrics.catalogue_version)})", "slowest process"),
            ), "Versions; the three are one but for a second after a publication.", 12),
        )),
        Section("Redis and store", (
            Panel("Redis' memory", "bytes", (
                (f"max({_name(metrics.redis_memory_bytes)})", "used"),
                (f"max({_name(metrics.redis_memory_limit_bytes)}) < Inf or vector(0)", "limit (0: none)"),
            ), "At its limit nothing new is issued.", 6),
            Panel("Without the store", "s", (
                (f"min({_name(metrics.outage_lasts_seconds)})", "issuing would last"),
            ), "How long issuing would go on at the planned rate if the store were away now.", 6),
            Panel("Servers and generation", "short", (
                (f"max by (server) ({_name(metrics.server_reachable)})", "{{server}} answers"),
                (f"max({_name(metrics.generation)})", "open generation"),
            ), "A generation that grows is a Redis that was restarted, emptied or replaced.", 6),
            Panel("Faults", "cps", (
                (f"sum(rate({_name(metrics.script_faults)}{OVER})) or vector(0)", "script calls"),
                (f"sum(rate({_name(metrics.step_faults)}{OVER})) or vector(0)", "steps of the worker"),
                (f"sum({_name(metrics.unsafe_settings)})", "unsafe settings"),
                (f"max({_name(metrics.redis_append_failing)})", "append-only file failing"),
            ), "All of it stays 0 while the servers are well.", 6),
        )),
        Section("Processes", (
            Panel("Serving", "short", (
                (f"sum({workers})", "should run"), (f"sum({ready})", "ready"), (f"sum({exits}_total)", "ended untold"),
            ), "Processes that answer requests."),
            Panel("Connections", "short", (
                (f"sum({_name(metrics.connections)})", "open"),
                (f"sum(rate({_name(metrics.connections_refused)}{OVER}))", "refused a second"),
            ), "Client connections."),
            Panel("Memory", "bytes", ((resident, "{{instance}} {{process}}"),),
                  "Resident memory of the serving processes."),
            Panel("Worker's loops", "s", (
                (f"time() - max by (loop) ({_name(metrics.loop_timestamp_seconds)})", "{{loop}}"),
            ), "Seconds since a loop ended a step, or found a server away.", 12),
            Panel("Versions", "short", (
                (f"sum by (version) ({build})", "{{version}}"),
            ), "What runs, one for each `serve` and `work`.", 12),
        )),
    )  # fmt: skip


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it; it asks which Prometheus to read."""
    return {
        "uid": "voucherd",
        "title": "voucherd",
        "tags": ["voucherd"],
        "schemaVersion": SCHEMA,
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [{"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}]
        },
        "panels": list(_placed()),
    }


def expressions() -> Iterator[tuple[str, str]]:
    """The title of each panel with each of its expressions."""
    for section in sections():
        for panel in section.panels:
            for expression, _ in panel.queries:
                yield panel.title, expression


def _placed() -> Iterator[dict[str, Any]]:
    ids, row = itertools.count(1), 0
    for section in sections():
        yield {
            "id": next(ids), "type": "row", "title": section.title, "collapsed": False, "panels": [],
            "gridPos": {"x": 0, "y": row, "w": WIDTH, "h": 1},
        }  # fmt: skip
        row, column = row + 1, 0
        for panel in section.panels:
            if column + panel.width > WIDTH:
                row, column = row + HEIGHT, 0
            yield _graph(next(ids), panel, column, row)
            column += panel.width
        row += HEIGHT


def _graph(id: int, panel: Panel, column: int, row: int) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": id,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": source,
        "gridPos": {"x": column, "y": row, "w": panel.width, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + number), "datasource": source, "expr": expression, "legendFormat": legend}
            for number, (expression, legend) in enumerate(panel.queries)
        ],
    }


def _quantiles(instrument: Histogram, labels: str = "", legend: str = "") -> Iterator[tuple[str, str]]:
    for quantile in (0.5, 0.99):
        rates = f"sum by (le) (rate({_base(instrument)}_bucket{labels}{OVER}))"
        yield f"histogram_quantile({quantile}, {rates})", f"{legend} p{quantile * 100:g}".strip()


def _base(instrument: MetricWrapperBase) -> str:
    (family,) = instrument.describe()
    return family.name


def _name(instrument: MetricWrapperBase) -> str:
    """As it is in the expositions."""
    (family,) = instrument.describe()
    return family.name + ("_total" if family.type == "counter" else "")


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dashboard(), indent=2) + "\n")
