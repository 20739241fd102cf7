"""What operators want the control plane to be, as one YAML or JSON file says it.

Only the form is looked at here; ``plan`` compares it with what there is.  A key that is there twice, a field that
nobody knows and a value of another type are refused: what is passed over silently is believed to be in force.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Final

import msgspec
import yaml
from msgspec import UNSET, Meta, UnsetType

from service.catalogue import Period
from service.domain import CapHolder
from service.errors import Fault
from service.store.campaigns import LIMIT_MAX
from service.store.control import ID

# A thousand campaigns take 200 kB; the YAML reader needs 3 s for this much.
FILE_BYTES_MAX: Final = 1 << 20

# Faults of one file that are shown together: more would push the first ones off the screen.
FAULTS_MAX: Final = 20

_UNKNOWN: Final = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)


class UnusableDeclaration(Fault):
    """Nothing of a file was applied, because of these faults in it, each with its path in the file."""

    def __init__(self, *faults: str) -> None:
        more = (f"and {len(faults) - FAULTS_MAX} more",) if len(faults) > FAULTS_MAX else ()
        # The file may hold anything, a terminal's control sequences included.
        super().__init__("\n".join(map(_printable, (*faults[:FAULTS_MAX], *more))))


Id = Annotated[str, Meta(pattern=rf"^{ID.pattern}\Z")]
Limit = Annotated[int, Meta(ge=0, le=LIMIT_MAX)]


class Form(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A mapping of the file.  A field that it does not have is left alone."""


class WantedPool(Form, frozen=True):
    """Values as `pool create` takes them; ``expires`` null: each code has to bring one."""

    id: Id
    expires: str | UnsetType | None = UNSET
    least_life: str | int | UnsetType = UNSET
    pattern: str | UnsetType = UNSET
    expires_after: int | UnsetType = UNSET


class WantedDistributor(Form, frozen=True):
    """``rate`` null: no limit.  A ``burst`` that is not given is the one that there was, or RateLimit's own."""

    id: Id
    name: str | UnsetType = UNSET
    active: bool | UnsetType = UNSET
    rate: int | UnsetType | None = UNSET
    burst: int | UnsetType = UNSET


class Limits(Form, frozen=True):
    """Caps of one holder.  Null: there is to be none for the period."""

    total: Limit | UnsetType | None = UNSET
    day: Limit | UnsetType | None = UNSET
    hour: Limit | UnsetType | None = UNSET

    def by(self, holder: CapHolder) -> dict[tuple[CapHolder, Period], int | None]:
        """What is said of caps per ``holder``, and of those that are counted otherwise."""
        said: dict[tuple[CapHolder, Period], int | None] = {}
        for name in self.__struct_fields__:
            value: Any = getattr(self, name)
            if isinstance(value, Limits):
                said |= value.by(name)  # type: ignore[arg-type] # such fields are named for holders
            elif value is not UNSET:
                said[holder, name] = value  # type: ignore[index] # and these for periods
        return said


class AssignmentCaps(Limits, frozen=True):
    """Counted for the distributor, or with ``terminal`` for each terminal of it."""

    terminal: Limits = Limits()


class CampaignCaps(Limits, frozen=True):
    """Counted for the whole campaign, or for each distributor or terminal."""

    distributor: Limits = Limits()
    terminal: Limits = Limits()


class WantedAssignment(Form, frozen=True):
    distributor: Id
    caps: AssignmentCaps = AssignmentCaps()


class WantedCampaign(Form, frozen=True):
    """Values as `campaign create` takes them; ``until`` null: open.  ``products`` are all there are to be."""

    id: Id
    category: Id | UnsetType = UNSET
    products: tuple[Id, ...] | UnsetType = UNSET
    pool: Id | UnsetType = UNSET
    priority: int | UnsetType = UNSET
    starts: str | UnsetType = msgspec.field(default=UNSET, name="from")
    until: str | UnsetType | None = UNSET
    time_zone: str | UnsetType = UNSET
    paused: bool | UnsetType = UNSET
    caps: CampaignCaps = CampaignCaps()
    assigned: tuple[WantedAssignment, ...] = ()


class Declaration(Form, frozen=True):
    """No two entries of a kind have the same id."""

    pools: tuple[WantedPool, ...] = ()
    distributors: tuple[WantedDistributor, ...] = ()
    campaigns: tuple[WantedCampaign, ...] = ()


class _Sections(Form, frozen=True):
    pools: tuple[Any, ...] = ()
    distributors: tuple[Any, ...] = ()
    campaigns: tuple[Any, ...] = ()


def declaration(content: bytes, name: str) -> Declaration:
    """What the file ``name`` says: JSON if its name ends so, or if it begins with a brace and is not called YAML.

    Raises UnusableDeclaration with line and column, or with the path of the first fault of every entry.
    """
    found = _parsed(content, name)
    if found is None or found == {}:
        raise UnusableDeclaration(f"{name} is empty: it has to say pools, distributors or campaigns")
    faults: list[str] = []
    sections = _converted("", found, _Sections, faults) or _Sections()
    entries: dict[str, list[Any]] = {}
    for kind, form in (("pools", WantedPool), ("distributors", WantedDistributor), ("campaigns", WantedCampaign)):
        made = [_converted(f"{kind}[{at}]", one, form, faults) for at, one in enumerate(getattr(sections, kind))]
        faults += _repeated(kind, made, "id")
        entries[kind] = [one for one in made if one is not None]
        for at, one in enumerate(made):
            faults += _repeated(f"{kind}[{at}].assigned", getattr(one, "assigned", ()), "distributor")
    if faults:
        raise UnusableDeclaration(*faults)
    return Declaration(**{kind: tuple(of_it) for kind, of_it in entries.items()})


def _converted(path: str, found: Any, form: type[Any], faults: list[str]) -> Any:
    """The ``form``, or None and one fault more."""
    try:
        return msgspec.convert(found, form)
    except msgspec.ValidationError as error:
        text, _, inside = str(error).partition(" - at `$")
        path += inside.rstrip("`")
        if unknown := _UNKNOWN.fullmatch(text):
            text, path = "there is no such field", f"{path}.{unknown[1]}"
        elif "matching regex" in text:  # only ids have one
            text = "it has to have 1 to 64 of A-Z a-z 0-9 . _ -"
        elif text.startswith("Expected `str") and text.endswith(("`int`", "`float`", "`bool`")):
            text += "; put it in quotes"
        faults.append(f"{path.lstrip('.') or 'the file'}: {text}")
        return None


def _repeated(path: str, entries: Iterable[Any], key: str) -> Iterator[str]:
    first: dict[str, int] = {}
    for at, one in enumerate(entries):
        if one is not None and first.setdefault(value := getattr(one, key), at) != at:
            yield f"{path}[{at}].{key}: {value} is there already, as {path}[{first[value]}]"


def _parsed(content: bytes, name: str) -> Any:
    if len(content) > FILE_BYTES_MAX:
        raise UnusableDeclaration(f"{name} is longer than {FILE_BYTES_MAX >> 20} MiB: split it, one after the other")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UnusableDeclaration(f"{name} is not text in UTF-8") from None
    is_json = name.endswith(".json") or (not name.endswith((".yaml", ".yml")) and text.lstrip().startswith("{"))
    try:
        return json.loads(text, object_pairs_hook=_object) if is_json else yaml.load(text, _Yaml)  # noqa: S506
    except json.JSONDecodeError as error:
        fault = f"is no JSON: line {error.lineno}, column {error.colno}: {error.msg}"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        fault = f"is no YAML: {place}{error.problem or error.context}"
    except yaml.YAMLError as error:
        fault = f"is no YAML: {' '.join(str(error).split())}"
    except RecursionError:
        fault = "is nested too deeply"
    except ValueError as error:  # a number of thousands of digits, a key that is there twice
        fault = f"can't be read: {error}"
    raise UnusableDeclaration(f"{name} {fault}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for at, (key, _) in enumerate(pairs) if key in dict(pairs[:at]))
        raise ValueError(f"{twice[:80]!r} is there twice in one object")
    return found


class _Yaml(yaml.SafeLoader):  # type: ignore[misc] # ships no types
    """The reader in Python: the one in C crashes on deep nesting.

    Unquoted text is what it is in JSON and else text: YAML 1.1 would take NO for false, 010 for 8, and a day or 12:30
    for something other than what an option takes.
    """

    yaml_implicit_resolvers: Final[dict[str, Any]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Raises ComposerError for an alias, a few lines of which can stand for a billion entries, and for a tag, which
        names a type that the text need not have."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
            what = "an alias" if isinstance(event, yaml.AliasEvent) else "a tag"
            raise yaml.composer.ComposerError(None, None, f"{what} is not taken: write it out", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Raises ConstructorError for a key that is there twice; YAML's own rule, which the reader does not keep."""
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        seen: set[str] = set()
        for key in keys:
            if key.value in seen:
                twice = f"{key.value[:80]!r} is there twice"
                raise yaml.constructor.ConstructorError(None, None, twice, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _form, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"-?(?:0|[1-9][0-9]*)", list("-0123456789")),
    ("float", r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?", list("-0123456789")),
):
    _Yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_form})\Z"), _first)


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else "?" for each in text)
