"""W3C Trace Context: what the header ``traceparent`` says, or nothing if it breaks a rule of its syntax.

https://www.w3.org/TR/trace-context/#traceparent-header.  A bad one is no reason to refuse a request: it is ignored.
"""

from __future__ import annotations

import re
from typing import Final

LENGTH: Final = 55  # of version 00, which has no other; later ones begin with as much
NAME: Final = b"traceparent"


def parsed(value: bytes) -> str:
    """``value`` in version 00: trace id, parent id and flags, as they were sent; '' if it is no traceparent.

    Of a later version, whose further flags and fields nobody knows yet, only whether the call is sampled is kept.
    """
    value = value.strip(b" \t")  # no part of it
    found = _SYNTAX(value)
    if found is None:
        return ""
    if value.startswith(b"00"):
        return value.decode() if len(value) == LENGTH else ""
    return f"00{value[2:53].decode()}{int(value[53:55], 16) & 1:02x}"


def well_formed(text: str) -> bool:
    """Whether ``text`` is what ``parsed`` made of a traceparent."""
    return text.isascii() and parsed(text.encode()) == text


def ids(trace: str) -> tuple[str, str]:
    """Trace id and parent id of what ``parsed`` made, in hexadecimal; two times '' of ''."""
    return trace[3:35], trace[36:52]


# No version ff, no id of zeros alone; lower case only.
_SYNTAX: Final = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-[!-~]*)?"
).fullmatch
