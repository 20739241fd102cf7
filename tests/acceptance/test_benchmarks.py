"""The benchmarks of what is kept and of size do what they say, on very little of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

ROOT = Path(__file__).parents[2]
SECONDS_MAX = 240


def benchmark(name: str, figures: Path, *arguments: str) -> tuple[dict[str, object], str]:
    """Its figures, and what it printed.  On so little its targets say nothing, so it may end with 1."""
    done = subprocess.run(
        [sys.executable, "-m", f"loadtest.{name}", "--json", str(figures), *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=SECONDS_MAX, check=False,
    )  # fmt: skip
    assert figures.exists(), done.stderr
    found = msgspec.json.decode(figures.read_bytes(), type=dict[str, object])
    assert done.returncode == (0 if all(bool(met) for met in found["met"]) else 1)  # type: ignore[attr-defined]
    return found, done.stdout


@pytest.mark.long
def test_a_larger_installation_is_asked_for_all_that_it_has(tmp_path: Path) -> None:
    found, said = benchmark(
        "scale", tmp_path / "figures.json", "--rounds", "1", "--requests", "200", "--campaigns", "30",
        "--codes", "500", "--records", "500", "--load", "2",
    )  # fmt: skip
    lines = msgspec.convert(found["lines"], list[dict[str, object]])
    assert [line["name"] for line in lines] == [
        "both alike", "30 campaigns, one asked", "30 campaigns, all asked", "30 distributors, all ask",
        "500 codes in stock", "500 replay records", "records expire, 3 a second",
    ]  # fmt: skip
    assert "a publication delays a request by" in said
    assert "it is in force after" in said
    assert "a scrape of " in said


def test_neither_a_record_nor_a_code_is_larger_than_promised(tmp_path: Path) -> None:
    found, said = benchmark("memory", tmp_path / "figures.json", "--records", "50000", "--requests", "2000")
    kept = msgspec.convert(found["kept"], list[dict[str, float | str]])
    assert kept[0]["server"] == "valkey-server"
    for one in kept:
        assert float(one["record"]) < (200 if one["server"] == "valkey-server" else 260), said
        assert float(one["code"]) < 60, said
        assert 50 < float(one["rewritten_bytes"]) <= float(one["written_bytes"]), said
        assert float(one["rewritten_a_s"]) > 10_000, said
        assert float(one["written_mb_s"]) > 1, said
