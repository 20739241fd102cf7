"""CPU per voucher, next to a no-op application on the same uvicorn: `make bench`.

Rates on a shared machine say more about the machine; CPU time per answer is steadier, and the ratio of two measured
in one run is steadier still.  Each round sends the same number of requests to the no-op application and then to
voucherd (one serving process, embedded Valkey with appendfsync always, SQLite), and reads the CPU time of each
process before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from loadtest.client import Run, run
from loadtest.vouchers import IssueVouchers, VoucherRequests
from service.client import Client

RATIO_MAX = 2.5  # the target: service + Redis over the no-op application
TWENTY_MAX = 6.0  # the target: a call for 20 vouchers over a call for one
TWENTY = 20
ONES_SHARE, TWENTIES_SHARE = 4, 20  # calls for one and for twenty: this part of the requests of a measurement
START_S_MAX = 60.0
STOP_S_MAX = 30.0


def main() -> int:
    """Measures and prints; exit status 1 if an answer was not 200 or the median ratio is over RATIO_MAX."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="pairs of measurements (default 5)")
    parser.add_argument("--requests", type=int, default=20_000, help="requests of one measurement (default 20,000)")
    parser.add_argument("--connections", type=int, default=64, help="connections, closed loop (default 64)")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    options = parser.parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder, Progress(console=console, transient=True) as progress:
        task = progress.add_task("starting", total=options.rounds * 4 + 2)
        rounds: list[dict[str, float]] = []
        with _noop() as (noop, noop_port), _voucherd(Path(folder), options) as (serving, valkey, work, demo):
            port = int(demo["base_url"].rsplit(":", 1)[1])
            vouchers = VoucherRequests(demo["token"], demo["distributor_id"])
            _check_client_api(demo)
            access_token = _access_token(demo)
            one, twenty = (IssueVouchers(access_token, demo["product_code"], quantity) for quantity in (1, TWENTY))
            progress.update(task, advance=1, description="warming up")
            _measure(noop_port, options, _plain_request, {"noop": [noop]}, warm=True)
            _measure(port, options, vouchers, {"serve": serving}, warm=True)
            _measure(port, options, one, {"serve": serving}, share=TWENTIES_SHARE)
            progress.advance(task)
            for number in range(options.rounds):
                progress.update(task, description=f"round {number + 1} of {options.rounds}")
                floor, floor_cpu = _measure(noop_port, options, _plain_request, {"noop": [noop]})
                progress.advance(task)
                ours, cpu = _measure(port, options, vouchers, {"serve": serving, "valkey": valkey, "work": work})
                progress.advance(task)
                ones, ones_cpu = _measure(port, options, one, {"serve": serving, "valkey": valkey}, share=ONES_SHARE)
                progress.advance(task)
                twenties, twenties_cpu = _measure(
                    port, options, twenty, {"serve": serving, "valkey": valkey}, share=TWENTIES_SHARE
                )
                progress.advance(task)
                seen = {"v1": ours, "v3": ones, f"v3 of {TWENTY}": twenties, "no-op": floor}
                if any(set(run.statuses) != {200} for run in seen.values()):
                    told = ", ".join(f"{name} {run.statuses}" for name, run in seen.items())
                    console.print(f"[red]not every answer was 200: {told}")
                    return 1
                rounds.append(
                    {
                        "noop_us": floor_cpu["noop"], "serve_us": cpu["serve"], "valkey_us": cpu["valkey"],
                        "work_us": cpu["work"], "ratio": (cpu["serve"] + cpu["valkey"]) / floor_cpu["noop"],
                        "rate": options.requests / ours.seconds, "noop_rate": options.requests / floor.seconds,
                        "v3_one_us": ones_cpu["serve"] + ones_cpu["valkey"],
                        "v3_twenty_us": twenties_cpu["serve"] + twenties_cpu["valkey"],
                        "twenty": (twenties_cpu["serve"] + twenties_cpu["valkey"])
                        / (ones_cpu["serve"] + ones_cpu["valkey"]),
                        "p50_ms": ours.percentile(0.5) * 1e3, "p99_ms": ours.percentile(0.99) * 1e3,
                    }
                )  # fmt: skip
    return _print(rounds, options)


def _print(rounds: list[dict[str, float]], options: argparse.Namespace) -> int:
    median = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    within = median["ratio"] <= RATIO_MAX and median["twenty"] <= TWENTY_MAX
    if options.json:
        print(json.dumps({"rounds": rounds, "median": median, "ratio_max": RATIO_MAX, "within": within}))
        return 0 if within else 1
    table = Table(title=f"{options.requests:,} requests a measurement, {options.connections} connections")
    for column in ("CPU per answer", "no-op app", "serve", "Valkey", "serve + Valkey", "ratio", "work"):
        table.add_column(column, justify="right")
    for number, one in enumerate([*rounds, median], 1):
        name = "median" if number > len(rounds) else f"round {number}"
        table.add_row(
            name, f"{one['noop_us']:.1f} us", f"{one['serve_us']:.1f} us", f"{one['valkey_us']:.1f} us",
            f"{one['serve_us'] + one['valkey_us']:.1f} us", f"{one['ratio']:.2f}", f"{one['work_us']:.1f} us",
            style="bold" if number > len(rounds) else "", end_section=number == len(rounds),
        )  # fmt: skip
    Console().print(table)
    print(
        f"median: {median['rate']:,.0f} vouchers/s (no-op {median['noop_rate']:,.0f}/s), "
        f"p50 {median['p50_ms']:.1f} ms, p99 {median['p99_ms']:.1f} ms; the load generator shares the machine"
    )
    print(f"serve + Valkey is {median['ratio']:.2f} of the no-op app, the target is at most {RATIO_MAX}:", end=" ")
    print("met" if median["ratio"] <= RATIO_MAX else "missed")
    each = median["v3_twenty_us"] / TWENTY
    print(
        f"Client API v3: one voucher {median['v3_one_us']:.1f} us, {TWENTY} in one {median['v3_twenty_us']:.1f} us "
        f"({each:.1f} us each), {median['twenty']:.2f} times as much; the target is at most {TWENTY_MAX:g}:",
        end=" ",
    )
    print("met" if median["twenty"] <= TWENTY_MAX else "missed")
    return 0 if within else 1


def _measure(
    port: int,
    options: argparse.Namespace,
    request: object,
    processes: dict[str, list[psutil.Process]],
    warm: bool = False,
    share: int = 1,
) -> tuple[Run, dict[str, float]]:
    """One run and the CPU microseconds per answer of each group of processes."""
    requests = max(1, options.requests // (10 if warm else share))
    before = {name: sum(map(_cpu_s, group)) for name, group in processes.items()}
    seen = run("127.0.0.1", port, options.connections, requests, request)  # type: ignore[arg-type]
    after = {name: sum(map(_cpu_s, group)) for name, group in processes.items()}
    return seen, {name: (after[name] - before[name]) / requests * 1e6 for name in processes}


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _plain_request(number: int) -> bytes:
    body = (
        b'{"request_id":"bench-0000000000000000-%d","distributor_id":"DIST-001","terminal_id":"AT-998877","product_ids":["PAY"]}'
        % number
    )
    return (
        b"POST /api/v1/voucher/request HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer vch_0000000000000000000000000000000000000000000000000\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )


@contextmanager
def _noop() -> Iterator[tuple[psutil.Process, int]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "loadtest.noop", str(port)])
    try:
        deadline = time.monotonic() + START_S_MAX
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise SystemExit("the no-op application did not start") from None
                time.sleep(0.05)
        yield psutil.Process(process.pid), port
    finally:
        process.terminate()
        process.wait(STOP_S_MAX)


@contextmanager
def _voucherd(
    folder: Path, options: argparse.Namespace
) -> Iterator[tuple[list[psutil.Process], list[psutil.Process], list[psutil.Process], dict[str, str]]]:
    """`voucherd up` with enough codes for all rounds; yields its serving, Valkey and worker processes."""
    data, vouchers = folder / "data", options.requests * (options.rounds + 1)
    environment = {
        **os.environ,
        # Windows that hold a whole measurement, so that what is measured is issuing and not waiting for a refill.
        "VOUCHERD_PLANNED_RATE": str(max(1, options.requests // 20)),
        "VOUCHERD_STORE_OUTAGE_S": "60",
    }
    command = [sys.executable, "-m", "service.cli.main"]
    up = subprocess.Popen(
        [*command, "up", "--data-dir", str(data), "--port", "0", "--ops-port", "0"],
        env=environment, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        demo = _wait_ready(data / "demo.json", up)
        codes = folder / "codes.csv"
        with codes.open("w") as file:
            file.write("code\n")
            file.writelines(f"BENCH-{number:08d}-{secrets.token_hex(4)}\n" for number in range(vouchers))
        subprocess.run(
            [*command, "codes", "import", "CAMP-001", str(codes), "--data-dir", str(data)],
            env=environment, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        sold = (options.rounds + 1) * options.requests * (1 / ONES_SHARE + TWENTY / TWENTIES_SHARE)
        subprocess.run(
            [*command, "codes", "generate", demo["product_code"], str(int(sold)), "--pattern", "B%%%%-%%%%-%%%%",
             "--data-dir", str(data)],
            env=environment, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        _wait_windows(demo, options.requests)
        processes = psutil.Process(up.pid).children(recursive=True)
        words = {process: " ".join(process.cmdline()) for process in processes}
        serving = [one for one, line in words.items() if "main serve" in line or "service.web.process" in line]
        valkey = [one for one, line in words.items() if "valkey-server" in line]
        work = [one for one, line in words.items() if "main work" in line]
        if not (serving and valkey and work):
            raise SystemExit(f"can't tell the processes of voucherd up apart: {sorted(words.values())}")
        yield serving, valkey, work, demo
    finally:
        up.terminate()
        up.wait(STOP_S_MAX)


def _check_client_api(demo: dict[str, str]) -> None:
    """What is about to be measured does what it should: 20 vouchers are issued, and read back as they were answered."""
    with Client(demo["base_url"], demo["client_id"], demo["client_secret"]) as client:
        issued = client.issue(demo["product_code"], TWENTY)
        if client.vouchers([voucher.voucher_id for voucher in issued.vouchers]) != issued.vouchers:
            raise SystemExit("vouchers were read back otherwise than they were issued")


def _access_token(demo: dict[str, str]) -> str:
    form = urllib.parse.urlencode({"grant_type": "client_credentials", **{
        name: demo[name] for name in ("client_id", "client_secret")
    }})  # fmt: skip
    with urllib.request.urlopen(f"{demo['base_url']}/oauth2/token", form.encode()) as answer:  # noqa: S310 - loopback
        return str(json.load(answer)["access_token"])


def _wait_ready(demo: Path, up: subprocess.Popen[bytes]) -> dict[str, str]:
    deadline = time.monotonic() + START_S_MAX
    while time.monotonic() < deadline and up.poll() is None:
        if demo.exists():
            found: dict[str, str] = json.loads(demo.read_text())
            try:
                with urllib.request.urlopen(f"{found['ops_url']}/readyz", timeout=1):  # noqa: S310 - our own loopback
                    return found
            except (urllib.error.URLError, OSError):
                pass
        time.sleep(0.1)
    raise SystemExit("voucherd up did not become ready")


def _wait_windows(demo: dict[str, str], codes: int) -> None:
    """Waits until a voucher comes at once: the import is in, and the window was filled with it."""
    deadline = time.monotonic() + START_S_MAX
    request = VoucherRequests(demo["token"], demo["distributor_id"])
    port = int(demo["base_url"].rsplit(":", 1)[1])
    while time.monotonic() < deadline:
        if set(run("127.0.0.1", port, 1, 100, request).statuses) == {200}:
            return
        time.sleep(0.2)
    raise SystemExit(f"the window did not fill with {codes:,} codes")


if __name__ == "__main__":
    sys.exit(main())
