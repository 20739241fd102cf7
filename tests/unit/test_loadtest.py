"""A load test's verdict: figures of what users wrote down, and no broken promise that it does not see."""

from __future__ import annotations

import contextlib
import math
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from loadtest.scenarios import __main__ as running
from loadtest.scenarios.outcome import Facts, Issued, Outcome, Sample, violations
from loadtest.scenarios.record import Attempt, Reader, encode
from loadtest.scenarios.report import Judged, Report, page
from loadtest.scenarios.scenario import SCENARIOS, Bound
from loadtest.scenarios.watch import Watch, sample
from loadtest.servers import free_port
from service.web.v3_errors import error_body
from tests.unit.test_documents import ROOT, rows

BEGAN = 1_000_000.0


def attempt(
    key: str = "one", at: float = 0.0, *, codes: tuple[str, ...] = ("A",), answer: str = "a", kind: str = "issued",
    seconds: float = 0.01, seller: str = "partner", part: str = "users", wanted: int = 1, token: str = "first",
    status: int = 200,
) -> Attempt:  # fmt: skip
    codes, answer = (codes, answer) if status in (200, 207) else ((), "")
    final = status not in (0, 429, 500, 503)
    return Attempt(
        part, seller, key, wanted, 1, BEGAN + at, BEGAN + at, seconds, status, kind, token, answer, codes, final
    )


def outcome(*attempts: Attempt, facts: Facts | None = None, seconds: float = 10.0) -> Outcome:
    return Outcome(attempts, BEGAN, (0.0, seconds), (seconds / 2, seconds), facts or Facts())


def ledger(*owned: tuple[str, str]) -> list[Issued]:
    return [Issued("partner", key, code, double=False) for key, code in owned]


def test_what_is_as_it_must_be_breaks_nothing() -> None:
    seen = outcome(
        attempt("one", codes=("A",)),
        attempt("one", 1.0, codes=("A",), kind="replayed"),
        attempt("two", codes=("B", "C"), wanted=2),
        attempt("late", status=0, kind="timed out"),  # nobody knows, and the ledger may have it
        attempt("refused", status=409, kind="exhausted"),
        facts=Facts(stocked={"P": 4}, left={"P": 0}, revoked={"first": BEGAN + 2.0}, findings=[]),
    )
    assert violations(seen, ledger(("one", "A"), ("two", "B"), ("two", "C"), ("late", "D"))) == []
    assert violations(seen, None) == []


@pytest.mark.parametrize(
    ("attempts", "owned", "promise"),
    [
        ((attempt("one"), attempt("two")), (("one", "A"),), "P1"),
        ((attempt("one"),), (("two", "A"),), "P1"),
        ((attempt("one"),), (), "P2"),
        ((attempt("one", status=409, kind="cap_reached"),), (("one", "A"),), "P2"),
        ((attempt("one"), attempt("one", answer="b")), (("one", "A"),), "P3"),
        ((attempt("one"), attempt("one", codes=("B",))), (("one", "A"), ("one", "B")), "P3"),
        ((attempt("one", wanted=2),), (("one", "A"),), "P3"),
        ((attempt("one"),), (("one", "A"), ("one", "B")), "P3"),
    ],
)
def test_no_broken_promise_is_passed_over(
    attempts: tuple[Attempt, ...], owned: tuple[tuple[str, str], ...], promise: str
) -> None:
    found = violations(outcome(*attempts), ledger(*owned))
    assert any(one.startswith(promise) for one in found), found


def test_a_code_that_somebody_had_before_is_no_voucher() -> None:
    double = [Issued("partner", "one", "A", double=True)]
    assert any(one.startswith("P1") for one in violations(outcome(attempt("one")), double))


def test_a_token_is_good_for_nothing_after_it_was_revoked() -> None:
    facts = Facts(revoked={"first": BEGAN + 1.0})
    assert violations(outcome(attempt("one", 0.9), attempt("two", 1.5, codes=("B",)), facts=facts), None) == [
        "P6: token first was good for sale two, 0.500 s after it was revoked"
    ]


def test_nobody_is_told_that_a_pool_is_exhausted_while_it_is_not() -> None:
    refused = attempt("one", status=409, kind="exhausted")
    (found,) = violations(outcome(refused, facts=Facts(stocked={"P": 3}, left={"P": 3})), None)
    assert found.startswith("P4")


@pytest.mark.parametrize(("left", "broken"), [(19, 0), (20, 1)])
def test_fewer_than_were_asked_for_is_no_reason_to_give_fewer_only_if_it_is_true(left: int, broken: int) -> None:
    """Client API v3 sells 1 to 20 at once, and all or nothing but for caps."""
    refused = attempt("one", status=400, kind=error_body("exhausted")["code"], wanted=20)
    found = violations(outcome(refused, facts=Facts(stocked={"P": 30}, left={"P": left})), None)
    assert [one[:2] for one in found] == ["P4"] * broken


def test_what_the_audit_finds_is_a_broken_promise() -> None:
    assert violations(outcome(attempt(), facts=Facts(findings=["P5, pool X: off"])), None) == ["audit: P5, pool X: off"]


def test_figures_are_those_of_the_sales_that_are_asked_for() -> None:
    some = [attempt(f"k{number}", number / 10, codes=(f"C{number}",), seconds=number / 1e3) for number in range(100)]
    seen = outcome(*some, attempt("k1", 9.9, codes=("C1",), kind="replayed"), attempt("x", 9.0, status=503, kind="503"))
    assert (seen.vouchers, len(seen.sales)) == (100, 101)
    assert seen.vouchers_a_second() == pytest.approx(10.0)
    assert seen.stage(0).vouchers_a_second() == pytest.approx(10.0)
    assert seen.stage(1).p_ms(50, "issued") == pytest.approx(75.0)
    assert seen.answered() == pytest.approx(100 * 100 / 101)
    assert seen.server_errors() == pytest.approx(100 / 102)
    assert seen.share("replayed", "503") == pytest.approx(200 / 102)
    assert seen.of("nobody").kinds == {}


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=lambda one: one.name)
def test_a_test_in_which_nothing_happened_meets_no_objective(scenario: object) -> None:
    nothing = Outcome([], BEGAN, (0.0, 1.0), SCENARIOS["steady"].ends(1.0) * 3, Facts())
    assert not all(bound.met(bound.figure(nothing)) for bound in scenario.objective)  # type: ignore[attr-defined]
    assert not Bound("", lambda _: 0.0, most=1).met(math.nan)


def test_a_line_that_is_still_being_written_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "record"
    reader = Reader(file)
    assert list(reader.new()) == []
    first, second = encode(attempt("one")), encode(attempt("two"))
    file.write_bytes(first + b"\n" + second[:10])
    assert [one.key for one in reader.new()] == ["one"]
    file.write_bytes(first + b"\n" + second + b"\n")
    assert [one.key for one in reader.new()] == ["two"]


def test_the_report_needs_nothing_besides_itself_and_says_what_was_missed() -> None:
    report = Report(
        scenario="steady", about="<b>", load="", url="http://127.0.0.1", machine="", began="", seconds=1.0, sales=1,
        vouchers=1, objective=[Judged("p99, ms", "at most 5", 7.123, met=False)], audited=False,
        violations=["P1: <script>"], kinds={"issued": (1, 1.0, 2.0)}, cores={},
    )  # fmt: skip
    text = page(report, "<svg></svg>")
    assert "MISSED" in text and "7.12" in text and "do not balance" in text
    assert "<script>" not in text and "<b>" not in text
    assert re.findall(r"(?:src|href)=|@import|url\(", text) == []


def test_without_a_scenario_they_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["loadtest"])
    assert running.main() == 0
    said = capsys.readouterr().out
    assert [name for name in SCENARIOS if name not in said] == []


def test_without_locust_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["loadtest", "steady"])
    monkeypatch.setattr(running, "find_spec", lambda _: None)
    assert running.main() == 2
    assert "locust is not installed: `make install` brings it" in " ".join(capsys.readouterr().err.split())


def test_a_token_alone_is_not_taken_for_what_needs_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "find_spec", lambda _: True)
    given = ["--url", "http://127.0.0.1:1", "--token", "x", "--distributor", "D", "--product", "P"]
    for scenario in ("depletion", "mixed", "noisy-neighbour", "token-rotation"):
        monkeypatch.setattr("sys.argv", ["loadtest", scenario, *given])
        assert running.main() == 2
        assert f"{scenario} needs more than a token" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["loadtest", "steady", *given[2:]])
    with pytest.raises(SystemExit):
        running.main()
    assert "--token needs --url" in capsys.readouterr().err


SERVE = """\
# TYPE voucherd_process_resident_bytes gauge
voucherd_process_resident_bytes{process="1"} 9e+07
voucherd_process_resident_bytes{process="2"} 8e+07
"""
WORK = """\
# TYPE voucherd_stock_codes gauge
voucherd_stock_codes{{pool="LT-1"}} {stock}
voucherd_stock_codes{{pool="ANOTHER"}} 5000
# TYPE voucherd_window_codes gauge
voucherd_window_codes{{pool="LT-1"}} 20
# TYPE voucherd_outbox_codes gauge
voucherd_outbox_codes{{partition="0"}} {outbox}
"""


def test_what_serve_and_what_work_say_of_themselves_is_one_sample() -> None:
    assert sample(1.0, [SERVE, WORK.format(stock=100, outbox=7)], {"LT-1"}) == Sample(1.0, 120.0, 7.0, 90.0)
    # Two workers tell of the same stock, one of them a moment later: it is not twice as much.
    twice = sample(1.0, [SERVE, WORK.format(stock=100, outbox=7), WORK.format(stock=90, outbox=9)], {"LT-1"})
    assert (twice.left, twice.outbox) == (110.0, 9.0)
    alone = sample(1.0, [SERVE], {"LT-1"})
    assert math.isnan(alone.left) and math.isnan(alone.outbox) and alone.serve_mb == 90.0


def test_a_port_that_does_not_answer_keeps_no_other_from_being_read(tmp_path: Path) -> None:
    with metrics_of(SERVE) as serve, metrics_of(WORK.format(stock=100, outbox=7)) as work:
        watch = Watch(tmp_path / "record", [serve, f"http://127.0.0.1:{free_port()}", work], ["LT-1"], print)
        watch._sample()
    assert [(one.left, one.outbox, one.serve_mb) for one in watch.samples] == [(120.0, 7.0, 90.0)]
    watch._sample()
    assert len(watch.samples) == 1, "nobody answers any more"


@contextlib.contextmanager
def metrics_of(text: str) -> Iterator[str]:
    """The URL of a process that says this of itself."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("by", ["option", "environment"])
def test_metrics_are_read_wherever_it_is_said(monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    urls = ["http://127.0.0.1:8081", "http://127.0.0.1:8082"]
    given = [word for url in urls for word in ("--ops-url", f"{url}/")] if by == "option" else []
    monkeypatch.setattr("sys.argv", ["loadtest", "soak", "--url", "http://127.0.0.1:8080", *given])
    monkeypatch.setenv("LOADTEST_OPS_URL", " ".join(urls) if by == "environment" else "http://elsewhere")
    assert running._options().ops_url == urls


def test_a_token_is_rotated_in_the_middle_of_a_peak_that_has_two_sides() -> None:
    (scenario,) = (one for one in SCENARIOS.values() if one.rotates)
    before, peak, after = scenario.stages
    assert peak.users > max(before.users, after.users)
    for seconds in (scenario.seconds, 8.0):
        begins, ends, _ = scenario.ends(seconds)
        assert scenario.rotation(seconds) == pytest.approx((begins + ends) / 2)


def test_the_guide_lists_every_scenario_with_its_load_and_its_objective() -> None:
    listed = rows((ROOT / "docs" / "loadtest.md").read_text(), "scenario")
    assert listed == [
        [
            one.name,
            one.about.replace("`", ""),
            one.load(),
            "; ".join(f"{bound.what}: {bound.limit}" for bound in one.objective),
        ]
        for one in SCENARIOS.values()
    ]
