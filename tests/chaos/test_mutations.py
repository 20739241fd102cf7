"""The mutations still fit the code, and their tests are there; whether they turn red takes `make mutations`."""

from __future__ import annotations

import re

import pytest

from tests.chaos.mutations import MUTATIONS, ROOT, Mutation, mutated


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda one: one.name)
def test_no_mutation_has_lost_its_place_or_its_test(mutation: Mutation) -> None:
    text = (ROOT / mutation.file).read_text()
    assert mutated(text, mutation) != text
    file, _, name = mutation.test.partition("::")
    assert re.search(rf"def {name.partition('[')[0]}\(", (ROOT / file).read_text())
    assert name.startswith(f"test_row_{mutation.row:02}_")
