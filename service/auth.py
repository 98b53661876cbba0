"""API keys: a file of names and SHA-256 digests, so that the file gives no key away; compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from pathlib import Path

from starlette.datastructures import Headers

from service.errors import Forbidden, Unauthorised

KEY_PREFIX = "det_"
LINE = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64}):(?P<digest>[0-9a-f]{64})")


class KeyFileError(ValueError):
    """A key file that cannot be used, with the line."""


class KeyRing:
    """Names by digest. Keys are random and long, so a plain fast hash is enough: there is nothing to guess."""

    def __init__(self, digests: dict[str, str]) -> None:
        self._digests = digests

    def holder(self, key: str) -> str | None:
        """Who holds the key. Every digest is compared, whatever the key is."""
        digest = hash_key(key)
        found = None
        for name, known in self._digests.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found


def hash_key(key: str) -> str:
    """What stands in the file for a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def make_key(name: str) -> tuple[str, str]:
    """A new random key, and its line for the file."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    return key, f"{name}:{hash_key(key)}"


def read_keys(path: Path) -> KeyRing:
    """Read a file of `name:sha256` lines; empty lines and lines that begin with # are left out.

    Raises:
        KeyFileError: unreadable, empty, or a line of another form (which is not shown: it may be a key).
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise KeyFileError(f"key file {path} cannot be read: {error.strerror}") from error
    digests: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = LINE.fullmatch(line.strip())
        if match is None:
            raise KeyFileError(f"key file {path}, line {number}: expected name:sha256; make one with `python -m service key NAME`")
        if match["name"] in digests:
            raise KeyFileError(f"key file {path}, line {number}: name {match['name']!r} comes twice")
        digests[match["name"]] = match["digest"]
    if not digests:
        raise KeyFileError(f"key file {path} holds no key; make one with `python -m service key NAME`")
    return KeyRing(digests)


def presented_key(headers: Headers) -> str | None:
    """The key of a request: `Authorization: Bearer KEY` or `X-API-Key: KEY`."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return credentials.strip()
    return headers.get("x-api-key") or None


def require_key(headers: Headers, ring: KeyRing, *, instead: KeyRing | None = None) -> str:
    """Who asks.

    Args:
        ring: the keys that open this.
        instead: keys that exist but do not open this, so that their holders get 403.

    Raises:
        Unauthorised: no key, or an unknown one. Forbidden: a key that is not for this.
    """
    key = presented_key(headers)
    if key is None:
        raise Unauthorised("a key is needed; send `Authorization: Bearer KEY` or `X-API-Key: KEY`")
    name = ring.holder(key)
    if name is not None:
        return name
    if instead is not None and instead.holder(key) is not None:
        raise Forbidden("this key is known, but it is not an admin key")
    raise Unauthorised("the key is not known here; ask the operator for one")
