"""The secrets file: the keys that voucher ids are derived with, and the one that signing keys are sealed with.

It is made once (`voucherd keys create`, or by `voucherd up`), is the same for every process of an installation, and is
kept apart from the store's backups: the store holds signing keys only sealed.  Whoever loses it can make no new ids of
old vouchers (those in the ledger stay) and has to make new signing keys.
"""

from __future__ import annotations

import base64
import secrets
from pathlib import Path
from typing import Annotated, Final

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from jwt.algorithms import RSAAlgorithm

from service.errors import Misconfigured
from service.identity import KEY_BYTES_MIN, IdKeys
from service.settings import refused

_NONCE_BYTES: Final = 12  # what AES-GCM takes
_SEALING_BYTES: Final = 32  # AES-256
_RSA_BITS: Final = 2048

_Name = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_-]{1,16}\Z")]


class _File(msgspec.Struct, forbid_unknown_fields=True):
    """The file: JSON, each key base64.  ``id_key`` names the one of ``id_keys`` that new vouchers get."""

    id_key: _Name
    id_keys: dict[_Name, bytes]
    sealing_key: bytes


class Keyring:
    """What an installation's secrets file holds."""

    def __init__(self, ids: IdKeys, sealing_key: bytes) -> None:
        self.ids = ids
        self._sealing = AESGCM(sealing_key)

    def seal(self, plain: bytes, purpose: str) -> str:
        """``plain``, so that only who has this key ring can read it, and only for the same ``purpose``."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return base64.b64encode(nonce + self._sealing.encrypt(nonce, plain, purpose.encode())).decode()

    def unseal(self, sealed: str, purpose: str) -> bytes:
        """What was sealed.  Raises Misconfigured if it was with another key, or for another purpose."""
        try:
            whole = base64.b64decode(sealed, validate=True)
            return self._sealing.decrypt(whole[:_NONCE_BYTES], whole[_NONCE_BYTES:], purpose.encode())
        except (InvalidTag, ValueError):
            raise Misconfigured(
                f"{purpose} was sealed with another secrets file: bring that back, or make new signing keys"
            ) from None


class NewSigningKey(msgspec.Struct, frozen=True):
    """A key that access tokens can be signed with: its name, its public half as a JWK, its private half sealed."""

    kid: str
    public: str
    sealed: str


def new_signing_key(keyring: Keyring) -> NewSigningKey:
    """A fresh RSA key; nobody but this key ring can read its private half."""
    private = rsa.generate_private_key(public_exponent=65_537, key_size=_RSA_BITS)
    kid = secrets.token_hex(8)
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = RSAAlgorithm.to_jwk(private.public_key(), as_dict=True)
    jwk = {"kty": "RSA", "use": "sig", "alg": "RS256", "kid": kid, "n": public["n"], "e": public["e"]}
    return NewSigningKey(kid, msgspec.json.encode(jwk).decode(), keyring.seal(pem, purpose_of(kid)))


def purpose_of(kid: str) -> str:
    """What the private half of a signing key is sealed for."""
    return f"the signing key {kid}"


def load(path: Path) -> Keyring:
    """The key ring in the file at ``path``.  Raises Misconfigured, without a word of what it holds."""
    try:
        held = msgspec.json.decode(path.read_bytes(), type=_File)
    except OSError as error:
        raise _refused(path, f"can't be read: {error.strerror}") from None
    except msgspec.DecodeError:
        raise _refused(path, "is no secrets file: make one with `voucherd keys create`") from None
    if held.id_key not in held.id_keys:
        raise _refused(path, f"there is no id key {held.id_key}, which is to be used for new vouchers")
    if any(not KEY_BYTES_MIN <= len(key) <= 64 for key in held.id_keys.values()):
        raise _refused(path, f"an id key has {KEY_BYTES_MIN} to 64 bytes")
    if len(held.sealing_key) != _SEALING_BYTES:
        raise _refused(path, f"the sealing key has {_SEALING_BYTES} bytes")
    return Keyring(IdKeys(held.id_key, held.id_keys), held.sealing_key)


def named(path: str) -> Keyring | None:
    """The key ring in the file that the settings name, None if they name none: such an installation has no Client API
    v3.  Raises Misconfigured."""
    return load(Path(path)) if path else None


def _refused(path: Path, problem: str) -> Misconfigured:
    return refused("secrets_file", str(path), problem)


def new() -> str:
    """The text of a new secrets file, from the system's secure random source."""
    held = _File("k1", {"k1": secrets.token_bytes(KEY_BYTES_MIN)}, secrets.token_bytes(_SEALING_BYTES))
    return msgspec.json.format(msgspec.json.encode(held).decode(), indent=2) + "\n"
