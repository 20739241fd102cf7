"""TLS for tests: an authority that is thrown away, and TLS in front of servers that were built without it.

The Valkey and the PostgreSQL of the test requirements are such servers, so what is tried with them is voucherd's side.
Where a Redis or a PostgreSQL with TLS is installed, the same tests run on that as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOST = "127.0.0.1"
DAY = datetime.timedelta(days=1)
SSL_REQUEST = (8).to_bytes(4, "big") + (80877103).to_bytes(4, "big")  # what a client of PostgreSQL asks for TLS with


class Authority:
    """Signs certificates; its own is in ``file``."""

    def __init__(self, directory: Path, name: str = "throw-away authority") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.file = directory / "ca.pem"
        self._name = _named(name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _dated(self._name, self._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self.file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def certificate(self, name: str, host: str = HOST) -> tuple[Path, Path]:
        """Files of a certificate for an address or a name, and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        try:
            subject: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            subject = x509.DNSName(host)
        certificate = (
            _dated(_named(name), self._name, key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([subject]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        files = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        files[1].write_bytes(_pem(key, serialization.NoEncryption()))
        return files

    def locked(self, key: Path) -> Path:
        """The same key in a file that needs a passphrase."""
        opened = serialization.load_pem_private_key(key.read_bytes(), None)
        assert isinstance(opened, ec.EllipticCurvePrivateKey)
        path = key.with_suffix(".locked")
        path.write_bytes(_pem(opened, serialization.BestAvailableEncryption(b"passphrase")))
        return path


class Terminator:
    """TLS on a port of loopback in front of ``upstream``, another one.  ``postgresql``: clients ask for TLS first."""

    def __init__(self, upstream: int, certificate: Path, key: Path, *, postgresql: bool = False) -> None:
        self.upstream = upstream
        self.port = 0
        self.handshakes = 0
        self._postgresql = postgresql
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        self._pairs: set[asyncio.Task[None]] = set()

    @contextlib.contextmanager
    def running(self) -> Iterator[Terminator]:
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)  # a client that refuses a certificate is no fault here
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        server = asyncio.run_coroutine_threadsafe(self._listen(), loop).result()
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(self._end(server), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    async def _listen(self) -> asyncio.Server:
        if self._postgresql:
            server = await asyncio.start_server(self._asked, HOST, 0)
        else:
            server = await asyncio.start_server(self._pair, HOST, 0, ssl=self._context)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _end(self, server: asyncio.Server) -> None:
        server.close()
        for pair in self._pairs:
            pair.cancel()
        await asyncio.gather(*self._pairs, return_exceptions=True)

    async def _asked(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError):
            assert await reader.readexactly(len(SSL_REQUEST)) == SSL_REQUEST, "a client that asks for no TLS"
            writer.write(b"S")
            await writer.start_tls(self._context)
            await self._pair(reader, writer)
        writer.close()

    async def _pair(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pairs.add(task)
        self.handshakes += 1
        with contextlib.suppress(OSError, asyncio.CancelledError):
            theirs, ours = await asyncio.open_connection(HOST, self.upstream)
            try:
                await asyncio.wait(
                    [asyncio.create_task(_pump(reader, ours)), asyncio.create_task(_pump(theirs, writer))],
                    return_when=asyncio.FIRST_COMPLETED,
                )
            finally:
                ours.transport.abort()
                writer.transport.abort()
        self._pairs.discard(task)


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(65_536):
            sink.write(data)
            await sink.drain()


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _dated(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=signs_certificates, crl_sign=signs_certificates, encipher_only=False,
        decipher_only=False,
    )  # fmt: skip


def _pem(key: ec.EllipticCurvePrivateKey, protection: serialization.KeySerializationEncryption) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)
