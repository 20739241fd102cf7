"""``python -m deploy.grafana.dashboard > deploy/grafana/voucherd.json``: the dashboard, from the instruments.

A panel asks for an instrument of ``service.metrics`` by its Python name, so one that is renamed or gone stops the
generator, not the dashboard.  What Grafana takes is Grafana's own to say: it is made by the library that its makers
generate from their schema, of the version that pyproject.toml names.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from typing import Final, NamedTuple

from grafana_foundation_sdk.builders.common import VizLegendOptions, VizTooltipOptions
from grafana_foundation_sdk.builders.dashboard import Dashboard as DashboardBuilder
from grafana_foundation_sdk.builders.dashboard import DatasourceVariable, Row
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.timeseries import Panel as TimeseriesPanel
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, TooltipDisplayMode
from grafana_foundation_sdk.models.dashboard import Dashboard, DataSourceRef
from prometheus_client import Histogram
from prometheus_client.metrics import MetricWrapperBase

from service import metrics
from service.metrics import Build, Supervision

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
            Panel("Answers", units.RequestsPerSecond, ((f"sum by (code) (rate({total}{OVER}))", "{{code}}"),),
                  "Requests a second by what they were answered."),
            Panel("Vouchers", units.CountsPerSecond, (
                (f"sum(rate({_name(metrics.vouchers_issued)}{OVER}))", "issued"),
                (f"sum(rate({_name(metrics.replays)}{OVER}))", "replayed"),
            ), "Vouchers issued to new requests, and requests answered from their record."),
            Panel("Server errors", units.PercentUnit, (
                (f'sum(rate({total}{{status=~"5.."}}{OVER})) / sum(rate({total}{OVER})) or vector(0)', "5xx"),
            ), "The objective is at most 0.1 % in 30 days."),
        )),
        Section("Latency", (
            Panel("Request", units.Seconds, tuple(_quantiles(metrics.request_seconds)),
                  "From the moment a request is taken up to its answer. The objective: 99 % within 0.1 s."),
            Panel("Issue script", units.Seconds, tuple(_quantiles(metrics.script_seconds, '{script="issue"}')),
                  "One call of Redis as the serving process saw it."),
            Panel("Batches", units.Short, (
                (f"sum(rate({batch}_sum{OVER})) / sum(rate({batch}_count{OVER}))", "requests a batch"),
                (f"sum({_name(metrics.queue)})", "vouchers waiting"),
            ), "Batches grow with load; what waits is bounded by VOUCHERD_QUEUE_MAX in each process."),
        )),
        Section("Refusals", (
            Panel("By campaign", units.RequestsPerSecond, (
                (f'topk(10, sum by (campaign, code) (rate({campaigns}{{{REFUSED}}}{OVER})))',
                 "{{campaign}} {{code}}"),
            ), "The ten that refuse most, by the campaign that was considered first.", 6),
            Panel("By distributor", units.RequestsPerSecond, (
                (f'topk(10, sum by (distributor, code) (rate({distributors}{{{REFUSED}}}{OVER})))',
                 "{{distributor}} {{code}}"),
            ), "The ten that are refused most; only those whose credential was confirmed.", 6),
            Panel("By guard", units.RequestsPerSecond, (
                (f"sum by (guard) (rate({_name(metrics.guard_refusals)}{OVER}))", "{{guard}}"),
            ), "For the sake of other requests: over a distributor's limit (429), more than can be taken (503).", 6),
            Panel("Credentials", units.RequestsPerSecond, (
                (f"sum by (api, code) (rate({_name(metrics.credentials_refused)}{OVER}))", "{{api}} {{code}}"),
                (f"sum(rate({_name(metrics.requests_malformed)}{OVER})) or vector(0)", "malformed HTTP"),
            ), "Tokens and secrets that were refused, and what was no HTTP.", 6),
        )),
        Section("Stock", (
            Panel("Seconds to empty", units.Seconds, (
                (f"bottomk(10, min by (pool) ({_name(metrics.pool_empty_in_seconds)}))", "{{pool}}"),
            ), "The ten that are empty first, at the burn rate of the last minute; infinite while nothing is issued."),
            Panel("Stored", units.Short, (
                (_fewest(f"max by (pool) ({_name(metrics.stock_codes)})"), "{{pool}}"),
            ), "Codes in the store, not leased to a window yet; the ten pools that have fewest, and one that has none "
               "only if somebody may ask it."),
            Panel("Windows and quarantine", units.Short, (
                (_fewest(f"min by (pool) ({_name(metrics.window_codes)})"), "{{pool}} in its window"),
                (f"sum(max by (pool) ({_name(metrics.quarantined_codes)})) or vector(0)", "in quarantine"),
            ), "Codes ready to issue, of the ten shortest windows; and those that a generation left behind."),
            Panel("Issued by campaign", units.CountsPerSecond, (
                (f"topk(10, sum by (campaign) (rate({_name(metrics.campaign_vouchers_issued)}{OVER})))",
                 "{{campaign}}"),
            ), "The ten that issue most.", 12),
            Panel("Refill", units.Seconds, (
                *_quantiles(metrics.lease_seconds, legend="lease"),
                *_quantiles(metrics.refill_seconds, legend="refill"),
            ), "Leasing in the store, and all of the way until the codes are in a window.", 12),
        )),
        Section("Ledger", (
            Panel("Outbox", units.Short, (
                (f"max by (partition) ({_name(metrics.outbox_codes)})", "codes in partition {{partition}}"),
                (f"min({_name(metrics.outbox_limit_codes)})", "at most"),
            ), "Vouchers that are not in the ledger yet.", 6),
            Panel("Outbox, bytes", units.BytesIEC, (
                (f"max by (partition) ({_name(metrics.outbox_bytes)})", "in partition {{partition}}"),
                (f"min({_name(metrics.outbox_limit_bytes)})", "at most"),
            ), "At its bound nothing new is issued.", 6),
            Panel("Lag", units.Seconds, (
                (f"max by (partition) ({_name(metrics.outbox_age_seconds)})", "oldest now"),
                *_quantiles(metrics.flush_lag_seconds, legend="flushed after"),
            ), "How long vouchers wait for the ledger.", 6),
            Panel("Flush", units.CountsPerSecond, (
                (f"sum(rate({_name(metrics.flushed)}{OVER}))", "codes a second"),
            ), "Codes written to the ledger.", 6),
            Panel("Books", units.Short, (
                (f"max by (books) ({_name(metrics.conservation_difference)})", "{{books}} differ"),
                (f"sum by (kind) ({_name(metrics.incidents)})", "incidents: {{kind}}"),
                (f"sum({_name(metrics.parked)})", "parked entries"),
                (f"max({_name(metrics.store_older)})", "store is older"),
            ), "All of it stays 0.", 12),
            Panel("Catalogue", units.Short, (
                (f"max({_name(metrics.catalogue_stored)})", "in the store"),
                (f"min({_name(metrics.fence_version)})", "in force"),
                (f"min({_name(metrics.catalogue_version)})", "slowest process"),
            ), "Versions; the three are one but for a second after a publication.", 12),
        )),
        Section("Redis and store", (
            Panel("Redis' memory", units.BytesIEC, (
                (f"max({_name(metrics.redis_memory_bytes)})", "used"),
                (f"max({_name(metrics.redis_memory_limit_bytes)}) < Inf or vector(0)", "limit (0: none)"),
            ), "At its limit nothing new is issued.", 6),
            Panel("Without the store", units.Seconds, (
                (f"min({_name(metrics.outage_lasts_seconds)})", "issuing would last"),
            ), "How long issuing would go on at the planned rate if the store were away now.", 6),
            Panel("Servers and generation", units.Short, (
                (f"max by (server) ({_name(metrics.server_reachable)})", "{{server}} answers"),
                (f"max({_name(metrics.generation)})", "open generation"),
            ), "A generation that grows is a Redis that was restarted, emptied or replaced.", 6),
            Panel("Faults", units.CountsPerSecond, (
                (f"sum(rate({_name(metrics.script_faults)}{OVER})) or vector(0)", "script calls"),
                (f"sum(rate({_name(metrics.step_faults)}{OVER})) or vector(0)", "steps of the worker"),
                (f"sum(max by (check) ({_name(metrics.unsafe_settings)}))", "unsafe settings"),
                (f"max({_name(metrics.redis_append_failing)})", "append-only file failing"),
            ), "All of it stays 0 while the servers are well.", 6),
        )),
        Section("Processes", (
            Panel("Serving", units.Short, (
                (f"sum({workers})", "should run"), (f"sum({ready})", "ready"), (f"sum({exits}_total)", "ended untold"),
            ), "Processes that answer requests."),
            Panel("Connections", units.Short, (
                (f"sum({_name(metrics.connections)})", "open"),
                (f"sum(rate({_name(metrics.connections_refused)}{OVER}))", "refused a second"),
            ), "Client connections."),
            Panel("Memory", units.BytesIEC, ((resident, "{{instance}} {{process}}"),),
                  "Resident memory of the serving processes."),
            Panel("Worker's loops", units.Seconds, (
                (f"time() - max by (loop) ({_name(metrics.loop_timestamp_seconds)})", "{{loop}}"),
            ), "Seconds since a loop ended a step, or found a server away.", 12),
            Panel("Versions", units.Short, (
                (f"sum by (version) ({build})", "{{version}}"),
            ), "What runs, one for each `serve` and `work`.", 12),
        )),
    )  # fmt: skip


def dashboard() -> Dashboard:
    """The dashboard as Grafana imports it; it asks which Prometheus to read."""
    whole = (
        DashboardBuilder("voucherd")
        .uid("voucherd")
        .tags(["voucherd"])
        .timezone("browser")
        .refresh("10s")
        .time("now-1h", "now")
        .with_variable(DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )
    ids = itertools.count(1)
    for section in sections():
        whole.with_row(Row(section.title).id(next(ids)))
        for panel in section.panels:
            whole.with_panel(_graph(next(ids), panel))
    return whole.build()


def text() -> str:
    """The dashboard as JSON."""
    return json.dumps(dashboard(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def expressions() -> Iterator[tuple[str, str]]:
    """The title of each panel with each of its expressions."""
    for section in sections():
        for panel in section.panels:
            for expression, _ in panel.queries:
                yield panel.title, expression


def _graph(id: int, panel: Panel) -> TimeseriesPanel:
    source = DataSourceRef(type_val="prometheus", uid="${datasource}")
    graph = (
        TimeseriesPanel()
        .id(id)
        .title(panel.title)
        .description(panel.about)
        .datasource(source)
        .unit(panel.unit)
        .min(0)
        .span(panel.width)
        .height(HEIGHT)
        .legend(
            VizLegendOptions().show_legend(True).display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
        )
        .tooltip(VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )
    for number, (expression, legend) in enumerate(panel.queries):
        ref_id = chr(ord("A") + number)
        graph.with_target(Dataquery().ref_id(ref_id).datasource(source).expr(expression).legend_format(legend))
    return graph


def _fewest(codes: str) -> str:
    """The ten pools that have fewest of these, but for those that are empty and that nobody may ask."""
    return f"bottomk(10, {codes} > 0 or min by (pool) ({_name(metrics.pool_empty_in_seconds)}) == 0)"


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
    sys.stdout.write(text())
