"""README and docs say what the code does: their tables are compared with it."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import re
import shlex
from pathlib import Path

import msgspec
import pytest
from typer.main import get_command

from deploy.grafana import dashboard
from loadtest.scenarios.__main__ import parser_of
from service import checks, metrics, settings
from service.cli.main import app
from service.web import postman
from service.web.problems import PROBLEMS
from service.web.v3_errors import REFUSALS

ROOT = Path(__file__).parents[2]
README_LINES_MAX = 200
DOCUMENTS = ["README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]
# What each process has of its own; any other gauge is of the store or of Redis, and each worker says the same of it.
OF_A_PROCESS = {
    "voucherd_queue_vouchers", "voucherd_connections", "voucherd_workers", "voucherd_workers_ready",
    "voucherd_process_resident_bytes", "voucherd_build_info",
}  # fmt: skip
TYPES_NOTHING = ("docs/errors.md",)


def rows(text: str, first_column: str) -> list[list[str]]:
    """The cells of the table whose first column is headed so, as plain text."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith(f"| {first_column} |"):
            next(lines)
            break
    else:
        pytest.fail(f"no table begins with {first_column!r}")
    found = []
    for line in lines:
        if not line.startswith("|"):
            break
        found.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    return found


def test_the_readme_lists_every_setting_with_its_default_and_meaning() -> None:
    tree = ast.parse(inspect.getsource(settings.Settings))
    body = tree.body[0].body  # type: ignore[attr-defined]
    meant = {
        field.target.id: said.value.value
        for field, said in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(said, ast.Expr)
    }
    defaults = {field.name: str(field.default) for field in msgspec.structs.fields(settings.Settings)}
    listed = rows((ROOT / "README.md").read_text(), "variable")
    assert listed == [[f"VOUCHERD_{name.upper()}", defaults[name], meant[name].replace("`", "")] for name in defaults]


def test_the_readme_keeps_to_its_length() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES_MAX


def typed(text: str) -> list[str]:
    """What its blocks of shell say to type, a command a line, without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_command_option_or_make_target_is_named_that_does_not_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    lines = "\n".join(typed(text))
    words = re.findall(r"`voucherd ([^`]*)`", text)
    words += re.findall(r"(?:^|^\.venv/bin/|-- )voucherd ([^|<>&'\n]*)", lines, re.MULTILINE)
    words += re.findall(r"run --rm(?: -T)? work ([^`|<>&'\n]*)", text)
    for one in words:
        assert_is_a_command(one)
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"`make ([a-z][\w-]*)", text) + re.findall(r"\bmake ([a-z][\w-]*)", lines)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert words or targets or name in TYPES_NOTHING


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_load_test_that_is_named_can_be_asked_for(name: str) -> None:
    text = (ROOT / name).read_text()
    inline = [words.replace("\n", " ") for words in re.findall(r"`(make loadtest[^`]*)`", text)]
    parser = parser_of({})
    for line in (line for line in [*typed(text), *inline] if "loadtest" in line):
        words = shlex.split(line)
        if "loadtest" in words and "make" in words:
            given = dict(word.split("=", 1) for word in words[words.index("loadtest") + 1 :])
            arguments = [*filter(None, [given.get("SCENARIO")]), *shlex.split(given.get("ARGS", ""))]
        elif words[:3] == ["python", "-m", "loadtest.scenarios"]:
            arguments = words[3:]
        else:
            continue
        if arguments != ["…"]:
            parser.parse_args(arguments)


def assert_is_a_command(words: str) -> None:
    """``voucherd`` has it, with these options."""
    command = root = get_command(app)
    context = root.make_context("voucherd", [], resilient_parsing=True)
    for word in words.split():
        if hasattr(command, "commands") and not word.startswith("-"):
            _, command, _ = command.resolve_command(context, [word])
            assert command is not None, f"voucherd {words}: {word}"
        elif word.startswith("--"):
            known = word == "--help" or any(word in option.opts for option in command.params)
            assert known, f"voucherd {words}: {word}"


def test_every_metric_is_documented_and_no_other() -> None:
    listed = rows((ROOT / "docs" / "metrics.md").read_text(), "metric")
    assert sorted(listed) == sorted([name, kind, help_] for name, kind, help_ in metrics.declared())


def test_the_bound_on_series_that_is_stated_is_that_of_the_codes_and_names_there_are() -> None:
    stated = " ".join((ROOT / "docs" / "metrics.md").read_text().split())
    codes = len({*PROBLEMS, *(one.code for one in REFUSALS.values()), "issued", "replayed"})
    names = metrics.NAMES_MAX + 1
    assert f"one of the {codes} that there are" in stated
    assert f"at most 2 × {names:,} × {codes} = {2 * names * codes:,} such series" in stated


def test_every_check_is_documented_and_no_other() -> None:
    listed = rows((ROOT / "docs" / "operations.md").read_text(), "check")
    assert listed == [
        [one.name, one.server, one.reads, one.why, one.do.replace("`", "")] for one in checks.CHECKS.values()
    ]


def test_every_code_of_the_error_table_is_in_the_integration_guide_of_the_readme_or_the_contract() -> None:
    documented = rows((ROOT / "docs" / "errors.md").read_text(), "code")
    assert sorted((code, status) for code, status, *_ in documented) == sorted(
        (code, str(problem.status)) for code, problem in PROBLEMS.items()
    )


def test_every_refusal_of_client_api_v3_is_in_the_guide_for_integrators() -> None:
    documented = rows((ROOT / "docs" / "integration.md").read_text(), "code")
    assert [row[:3] for row in documented] == [[one.code, str(one.status), one.message] for one in REFUSALS.values()]
    assert {one.code for one in REFUSALS.values() if one.retryable} == {
        row[0] for row in documented if row[3].startswith("the same key")
    }


def test_the_postman_collection_is_that_of_this_version() -> None:
    assert json.loads((ROOT / "docs" / "postman.json").read_text()) == postman.collection()


def test_no_panel_adds_up_what_each_worker_says_of_the_same_thing() -> None:
    """Several workers watch one store and one Redis: what they say is the same, some a moment later."""
    of_the_partition = [name for name, kind, _ in metrics.declared() if kind == "gauge" and name not in OF_A_PROCESS]
    for title, expression in dashboard.expressions():
        for name in of_the_partition:
            assert not re.search(rf"\bsum( by \([^)]*\))? ?\({name}\b", expression), (title, expression)


def test_the_grafana_dashboard_is_that_of_this_version() -> None:
    assert (ROOT / "deploy" / "grafana" / "voucherd.json").read_text() == dashboard.text()
