"""As much of curl as the documents use, for machines that don't have it: ``python -m tests.acceptance.curl``."""

from __future__ import annotations

import argparse
import sys

import httpx


def main() -> None:
    parser = argparse.ArgumentParser("curl")
    parser.add_argument("url")
    parser.add_argument("-s", "--silent", action="store_true")
    parser.add_argument("-i", "--include", action="store_true")
    parser.add_argument("-X", "--request", default="")
    parser.add_argument("-H", "--header", action="append", default=[])
    parser.add_argument("-d", "--data")
    parser.add_argument("-u", "--user")
    given = parser.parse_args()
    headers = dict(header.split(": ", 1) for header in given.header)
    user, _, password = (given.user or "").partition(":")
    if given.data is not None:
        headers.setdefault("content-type", "application/x-www-form-urlencoded")
    response = httpx.request(
        given.request or ("GET" if given.data is None else "POST"), given.url, headers=headers, content=given.data,
        auth=(user, password) if given.user else None, trust_env=False,
    )  # fmt: skip
    if given.include:
        lines = [f"HTTP/1.1 {response.status_code} {response.reason_phrase}"]
        sys.stdout.write("\n".join([*lines, *(f"{name}: {value}" for name, value in response.headers.items()), "", ""]))
    sys.stdout.buffer.write(response.content)


if __name__ == "__main__":
    main()
