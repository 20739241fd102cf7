"""The content of an import: a file or what is piped in, as it is or compressed by gzip, in lines.

It is read twice.  The first time it is only looked at: the same content is the same import, and what is truncated or
damaged is found before anything of it is in stock, for a damaged code is one that nobody can redeem.  What is piped in
is kept in a temporary file meanwhile, which has no name and is gone when the process ends, however it ends.
"""

from __future__ import annotations

import gzip
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, Final

from service.errors import Fault

# A code, a serial number and a time take 220 bytes as CSV and 290 as JSON.  What is longer is no line of ours, and
# must not be held in memory.
LINE_BYTES_MAX: Final = 1_000

BLOCK_BYTES: Final = 1 << 18  # held at a time, a few thousand lines

# Of what is piped in, as it comes: more than ten million of the longest lines.
PIPED_BYTES_MAX: Final = 4 << 30

_GZIP: Final = b"\x1f\x8b"


class UnusableFile(Fault):
    """The file can't be imported as a whole; nothing of it was."""


def _nobody_looks(read: int, size: int) -> None: ...


class Content:
    """One content, whole and readable until it is closed.

    ``read`` says how many of its ``size`` bytes, compressed if they are, have been looked at; ``id`` is the SHA-256 of
    what they hold, hex: the same wherever it lies and however it is compressed.
    """

    def __init__(self, source: Path | BinaryIO, looked_at: Callable[[int, int], None] = _nobody_looks) -> None:
        """``looked_at`` is told bytes read and all there are (0: nobody knows yet) while it is read the first time.

        Raises UnusableFile, also for OSError, if ``source`` can't be read, is too long, truncated or damaged.
        """
        self.name = str(source) if isinstance(source, Path) else "the standard input"
        self.read = 0
        self.size = 0
        self._source = source
        self._spool: BinaryIO | None = None
        content = sha256()
        try:
            with self._readable():
                if isinstance(source, Path):
                    if not source.is_file():
                        raise UnusableFile(
                            f"{source} is not a file: a pipe is read as -"
                            if source.exists()
                            else f"there is no file {source}"
                        )
                    self.size = source.stat().st_size
                else:
                    self._keep(source, looked_at)
                for block in self._blocks():
                    content.update(block)
                    looked_at(self.read, self.size)
        except BaseException:
            self.close()
            raise
        self.id = content.hexdigest()

    def close(self) -> None:
        """What was piped in is kept no longer."""
        if self._spool is not None:
            self._spool.close()

    def lines(self) -> Iterator[bytes]:
        """Every line without its newline; one that is too long comes cut to more than LINE_BYTES_MAX bytes.

        Raises UnusableFile at the end if the content is no longer what ``id`` says.
        """
        content = sha256()
        rest = b""
        changed = UnusableFile(
            f"{self.name} changed while it was imported: what came before is in stock; import it again"
        )
        try:
            for block in self._blocks():
                content.update(block)
                *lines, rest = (rest + block).split(b"\n")
                yield from lines
                rest = rest[: LINE_BYTES_MAX + 2]  # one for a carriage return, one that is too many
        except (OSError, EOFError, zlib.error):
            raise changed from None
        if content.hexdigest() != self.id:
            raise changed
        if rest:
            yield rest

    def _blocks(self) -> Iterator[bytes]:
        with self._opened() as raw:
            compressed = raw.read(len(_GZIP)) == _GZIP
            raw.seek(0)
            with gzip.GzipFile(fileobj=raw, mode="rb") if compressed else raw as file:
                while block := file.read(BLOCK_BYTES):
                    self.read = raw.tell()
                    yield block

    def _opened(self) -> BinaryIO:
        if self._spool is None:
            assert isinstance(self._source, Path)
            return self._source.open("rb")
        self._spool.seek(0)
        return os.fdopen(os.dup(self._spool.fileno()), "rb")

    def _keep(self, piped: BinaryIO, looked_at: Callable[[int, int], None]) -> None:
        try:
            self._spool = tempfile.TemporaryFile()  # noqa: SIM115 - it is read more than once
            while part := piped.read(BLOCK_BYTES):
                self._spool.write(part)
                self.size += len(part)
                looked_at(self.size, 0)
                if self.size > PIPED_BYTES_MAX:
                    raise UnusableFile(
                        f"more than {PIPED_BYTES_MAX >> 30} GiB were piped in: write them to a file, and import that"
                    )
            self._spool.flush()
        except OSError as error:
            raise UnusableFile(
                f"what is piped in can't be kept in {tempfile.gettempdir()}: {error.strerror}; write it to a file and "
                "import that, or name another directory with TMPDIR"
            ) from None

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except EOFError:
            raise UnusableFile(
                f"{self.name} is truncated: its gzip ends in the middle; nothing was imported, get the whole of it"
            ) from None
        except (gzip.BadGzipFile, zlib.error):
            raise UnusableFile(
                f"{self.name} is damaged: its gzip does not fit its checksum; nothing was imported, get it again"
            ) from None
        except OSError as error:
            raise UnusableFile(f"{self.name} can't be read: {error.strerror}") from None
