"""The form of a declaration: what can't be meant is refused with its place, and nothing is passed over."""

from __future__ import annotations

import random
import time

import pytest
from msgspec import UNSET

from service.worker.declaration import FAULTS_MAX, FILE_BYTES_MAX, UnusableDeclaration, declaration


def refused(content: bytes, name: str = "wanted.yaml") -> list[str]:
    """The faults."""
    with pytest.raises(UnusableDeclaration) as caught:
        declaration(content, name)
    said = str(caught.value).split("\n")
    assert all(fault.isprintable() for fault in said)
    return said


def test_yaml_and_json_say_the_same() -> None:
    yaml = b"""
campaigns:
- id: C
  products: [PAY, MOB]
  from: 2026-12-01
  until:
  priority: 7
  caps: {day: 100, hour: null, terminal: {total: 1}}
  assigned:
  - distributor: D
    caps: {terminal: {hour: 2}}
"""
    json = b"""\xef\xbb\xbf {"campaigns": [{"id": "C", "products": ["PAY", "MOB"], "from": "2026-12-01", "until": null,
    \t"priority": 7, "caps": {"day": 100, "hour": null, "terminal": {"total": 1}},
    \t"assigned": [{"distributor": "D", "caps": {"terminal": {"hour": 2}}}]}]}"""
    found = declaration(yaml, "x.yaml")
    assert found == declaration(json, "x.json") == declaration(json, "standard input")
    [campaign] = found.campaigns
    assert (campaign.starts, campaign.until, campaign.category) == ("2026-12-01", None, UNSET)
    assert campaign.caps.by("campaign") == {
        ("campaign", "day"): 100, ("campaign", "hour"): None, ("terminal", "total"): 1,
    }  # fmt: skip
    assert campaign.assigned[0].caps.by("distributor") == {("terminal", "hour"): 2}


def test_unquoted_text_is_taken_as_it_stands() -> None:
    text = b"campaigns: [{id: NO, category: 12e, products: [off, 007, 0x1f, 1_000, .5], from: 2026-12-01, until: 1:30}]"
    [campaign] = declaration(text, "wanted.yml").campaigns
    assert (campaign.id, campaign.category, campaign.starts, campaign.until) == ("NO", "12e", "2026-12-01", "1:30")
    assert campaign.products == ("off", "007", "0x1f", "1_000", ".5")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "wanted.yaml is empty: it has to say pools, distributors or campaigns"),
        ("# nothing\n", "wanted.yaml is empty: it has to say pools, distributors or campaigns"),
        ("{}", "wanted.yaml is empty: it has to say pools, distributors or campaigns"),
        ("campaigns: [", "wanted.yaml is no YAML: line 1, column 13"),
        ("campaigns:\n\t- id: C", "wanted.yaml is no YAML: line 2, column 1"),
        ("pools: \x00", "wanted.yaml is no YAML"),
        ("pools: []\n---\npools: []", "wanted.yaml is no YAML: line 2, column 1"),
        ("- id: C", "the file: Expected `object`, got `array`"),
        ("pools: P", "pools: Expected `array`, got `str`"),
        ("pools:", "pools: Expected `array`, got `null`"),
        ("pools: [P]", "pools[0]: Expected `object`, got `str`"),
        ("campagnes: []", "campagnes: there is no such field"),
        ("1: []", "the file: Expected `str`"),
        ("campaigns:\n- id: C\n  prodcuts: [P]", "campaigns[0].prodcuts: there is no such field"),
        ("campaigns: [{id: C, assigned: [{distributor: D, cap: 1}]}]", "campaigns[0].assigned[0].cap: there is no"),
        ("campaigns: [{id: C, caps: {week: 1}}]", "campaigns[0].caps.week: there is no such field"),
        ("campaigns: [{id: C, caps: {total: many}}]", "campaigns[0].caps.total: Expected `int | null`, got `str`"),
        ("campaigns: [{id: C, caps: {terminal: {day: -1}}}]", "campaigns[0].caps.terminal.day: Expected `int` >= 0"),
        ("campaigns: [{id: C, caps: {day: 9007199254740993}}]", "campaigns[0].caps.day: Expected `int` <= "),
        ("campaigns: [{id: C, caps: [day=1]}]", "campaigns[0].caps: Expected `object`, got `array`"),
        ("campaigns: [{id: C, assigned: [{distributor: D, caps: {campaign: {day: 1}}}]}]",
         "campaigns[0].assigned[0].caps.campaign: there is no such field"),
        ("campaigns: [{category: C}]", "campaigns[0]: Object missing required field `id`"),
        ("pools: [{id: 7}]", "pools[0].id: Expected `str`, got `int`; put it in quotes"),
        ("pools: [{id: a b}]", "pools[0].id: it has to have 1 to 64 of A-Z a-z 0-9 . _ -"),
        ("pools: [{id: ''}]", "pools[0].id: it has to have 1 to 64 of A-Z a-z 0-9 . _ -"),
        ('pools: [{id: "P\\n"}]', "pools[0].id: it has to have 1 to 64 of A-Z a-z 0-9 . _ -"),
        ("campaigns: [{id: C, pool: true}]", "campaigns[0].pool: Expected `str`, got `bool`; put it in quotes"),
        ("campaigns: [{id: C, products: P}]", "campaigns[0].products: Expected `array`, got `str`"),
        ("campaigns: [{id: C, priority: high}]", "campaigns[0].priority: Expected `int`, got `str`"),
        ("campaigns: [{id: C, priority: 010}]", "campaigns[0].priority: Expected `int`, got `str`"),
        ("campaigns: [{id: C, priority: 1.5}]", "campaigns[0].priority: Expected `int`, got `float`"),
        ("campaigns: [{id: C, paused: yes}]", "campaigns[0].paused: Expected `bool`, got `str`"),
        ("campaigns: [{id: C, pool: null}]", "campaigns[0].pool: Expected `str`, got `null`"),
        ("pools: []\npools: []", "wanted.yaml is no YAML: line 2, column 1: 'pools' is there twice"),
        ("pools: [{id: P, id: Q}]", "wanted.yaml is no YAML: line 1, column 17: 'id' is there twice"),
        ("pools: [{id: P}, {id: P}]", "pools[1].id: P is there already, as pools[0]"),
        ("pools: [{id: [P]}]", "pools[0].id: Expected `str`, got `array`"),
        ("campaigns: [{id: C, assigned: [{distributor: D}, {distributor: D}]}]",
         "campaigns[0].assigned[1].distributor: D is there already, as campaigns[0].assigned[0]"),
        ("pools: [{<<: {id: P}}]", "pools[0].<<: there is no such field"),
        ("pools: !!python/object:os.system x", "wanted.yaml is no YAML: line 1, column 8: a tag is not taken"),
        ("campaigns: [{id: C, paused: !!bool x}]", "wanted.yaml is no YAML: line 1, column 29: a tag is not taken"),
        ("pools: *nowhere", "wanted.yaml is no YAML: line 1, column 8: an alias is not taken: write it out"),
        ("? [a]\n: b", "wanted.yaml is no YAML: line 1, column 3"),
        ("[" * 5_000 + "]" * 5_000, "wanted.yaml is nested too deeply"),
        ("campaigns: [{id: C, priority: " + "9" * 5_000 + "}]", "wanted.yaml can't be read: Exceeds the limit"),
        ('pools: [{id: P, "\\e[2J": 1}]', "pools[0].?[2J: there is no such field"),
    ],
)  # fmt: skip
def test_what_can_not_be_meant_is_refused_with_its_place(text: str, says: str) -> None:
    [fault] = refused(text.encode())
    assert fault.startswith(says)
    assert ("in quotes" in fault) == ("in quotes" in says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no JSON: line 1, column 1"),
        ("null", "is empty"),
        ('{"pools": [}', "is no JSON: line 1, column 12"),
        ('{"pools": [], "pools": []}', "'pools' is there twice"),
        ('{"pools": [{"id": "P", "expiry": 1}]}', "pools[0].expiry: there is no such field"),
        ('{"campaigns": [{"id": "C", "priority": NaN}]}', "campaigns[0].priority: Expected `int`, got `float`"),
        ('{"pools": ' + "[" * 100_000, "is nested too deeply"),
    ],
)
def test_what_json_can_not_mean_is_refused_with_its_place(text: str, says: str) -> None:
    [fault] = refused(text.encode(), "wanted.json")
    assert says in fault


def test_faults_of_several_entries_are_told_together() -> None:
    faults = refused(b"pools: [{id: P, x: 1}, {id: Q}, {id: Q}]\ncampaigns: [{id: 1}, {id: C, caps: {day: x}}]")
    assert [fault.partition(":")[0] for fault in faults] == [
        "pools[0].x", "pools[2].id", "campaigns[0].id", "campaigns[1].caps.day",
    ]  # fmt: skip
    faults = refused(b"pools: [" + b"{}, " * 100 + b"]")
    assert len(faults) == FAULTS_MAX + 1
    assert faults[-1] == "and 80 more"


def test_what_is_not_utf_8_or_too_long_is_refused() -> None:
    assert refused(b"pools: [{id: \xff}]") == ["wanted.yaml is not text in UTF-8"]
    assert refused("pools: []".encode("utf-16"), "wanted.yaml")[0].startswith("wanted.yaml is not text in UTF-8")
    assert refused(b"#" * (FILE_BYTES_MAX + 1))[0].startswith("wanted.yaml is longer than 1 MiB")


def test_bomb_of_aliases_is_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{at}: &a{at} [{', '.join([f'*a{at - 1}'] * 9)}]" for at in range(1, 12)]
    begun = time.monotonic()
    [fault] = refused("\n".join(lines).encode())
    assert "an alias is not taken" in fault
    assert time.monotonic() - begun < 2


def test_no_damage_to_a_file_raises_anything_else(rng: random.Random) -> None:
    """A mistake of the reader must not end as a traceback, nor print what moves the cursor."""
    yaml = """pools: [{id: P, expires: 2035-12-31}]
campaigns:
- {id: C, products: [PAY, "MOB"], priority: 7, paused: true, until: null, caps: {day: 10}}
"""
    json = '{"pools": [{"id": "P"}], "campaigns": [{"id": "C", "priority": 7, "caps": {"total": null}}]}'
    pieces = [*"[]{}:,'\"\\|>%?~\n\t\0\u2028é", "null", "-1", "9" * 30, "&a ", "*a", "!!bool x", "<<: ", "---", "1e999"]
    said = []
    for _ in range(500):
        name, text = rng.choice([("wanted.yaml", yaml), ("wanted.json", json)])
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(pieces) + text[at + rng.choice([0, 1, 5, 20]) :]
        try:
            declaration(text.encode(), name)
        except UnusableDeclaration as fault:
            said += str(fault).split("\n")
    assert len(said) > 100
    assert all(line and line.isprintable() for line in said)
