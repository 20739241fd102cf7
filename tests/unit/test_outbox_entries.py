"""Outbox entries as a worker reads them: of every version that may have written one, and of nothing else."""

from __future__ import annotations

import pytest

from service.domain import RECORD_SEPARATOR, Code, Record, Rule
from service.identity import NO_KEYS
from service.store.entries import Entry, rows_of
from service.worker.flush import parse

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACE = f"00-{TRACE_ID}-{PARENT_ID}-01"


def record(number: int) -> Record:
    code = Code(1_900_000_000, 1, number, f"CODE-{number}", f"SER-{number}")
    return Record("T\tPAY", "v1", "D", "D", f"req-{number}", 1_800_000_000, Rule("CAMP", "P", "CAT", "PAY", 0), (code,))


def fields(**changed: str) -> dict[str, str]:
    issued = RECORD_SEPARATOR.join(record(number).pack_entry() for number in range(2))
    return {"generation": "1", "seq": "7", "codes": "2", "bytes": "9", "issued": issued, "asides": "", **changed}


def read(**changed: str) -> Entry:
    return parse(0, 1, "1-0", fields(**changed))


def traces_of(entry: Entry) -> list[tuple[str, str]]:
    return [(row.trace_id, row.parent_id) for row in rows_of([entry], 0, NO_KEYS).requests]


def test_an_entry_of_a_process_that_knows_no_traces_is_whole() -> None:
    assert read().records == (record(0), record(1))
    assert traces_of(read()) == [("", ""), ("", "")]


def test_a_trace_is_that_of_its_own_request() -> None:
    assert traces_of(read(traces=f"\x1e{TRACE}")) == [("", ""), (TRACE_ID, PARENT_ID)]
    assert traces_of(read(traces=f"{TRACE}\x1e")) == [(TRACE_ID, PARENT_ID), ("", "")]
    assert traces_of(read(traces="\x1e")) == [("", ""), ("", "")]


def test_what_later_versions_add_to_an_entry_is_left_alone() -> None:
    assert read(more="of it").records == read().records


@pytest.mark.parametrize("bad", ["", TRACE, "\x1ebad", f"{TRACE}\x1e\x1e", f"{TRACE[:-1]}\x1e", f"{TRACE}0\x1e"])
def test_traces_that_no_process_of_ours_has_written_are_not_believed(bad: str) -> None:
    with pytest.raises(ValueError, match="traces"):
        read(traces=bad)
