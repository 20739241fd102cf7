"""What no log line may hold, at any level: codes, tokens, secrets, passwords."""

from __future__ import annotations

import re
from collections.abc import Iterable

from service.tokens import LENGTH, PREFIX, SECRET_PREFIX

_WORD = re.compile(r"[\w.-]+")
_SECRETS = re.compile(
    rf"(?:{PREFIX}|{SECRET_PREFIX})[0-9A-Za-z]{{{LENGTH - len(PREFIX)}}}"  # a distributor's token, a client's secret
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}"  # an access token
    r"|BEGIN [A-Z ]*PRIVATE KEY"
    r"|://[^\s/:@]*:[^\s/@]+@"  # a password in a URL
)


def leaks(text: str, codes: Iterable[str]) -> list[str]:
    """The secrets in ``text``, and those of ``codes`` that are in it."""
    known = set(codes)
    unlike_words = {code for code in known if _WORD.fullmatch(code) is None}
    found = known.intersection(_WORD.findall(text)) | {code for code in unlike_words if code in text}
    return sorted(found) + _SECRETS.findall(text)
