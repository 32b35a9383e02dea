"""API keys, read once from a file and kept as hashes only."""

from __future__ import annotations

import hashlib
import hmac
import stat
import warnings
from pathlib import Path

MOST_KEYS, MOST_BYTES, LONGEST_NAME = 10_000, 2**20, 64
SHORT_KEY = 16  # characters; shorter keys can be guessed


class ApiKeys:
    """The keys of a server, each with an id that logs, limits and sessions use instead of the key."""

    def __init__(self, ids: dict[bytes, str]):
        """ids: of each key, by the key's SHA-256."""
        self._ids = ids

    @classmethod
    def read(cls, path: Path) -> ApiKeys:
        """The keys of a file: lines of `name:key`, or a key alone, whose id is then the start of its hash.

        Several keys may have one name, so that a key can be replaced while both are accepted. Empty lines and lines
        that begin with # are skipped. Warns of a file that other users may read, and of short keys.

        Raises ValueError, which names the line and never a key, and OSError.
        """
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
            mode = stat.S_IMODE(path.stat().st_mode)
        if len(data) > MOST_BYTES:
            raise ValueError(f"{path} has more than {MOST_BYTES:,} bytes; accepted: a file of API keys, one per line")
        if mode & 0o077:
            warnings.warn(f"other users may open {path} (mode {mode:o}); better: chmod 600", stacklevel=2)
        ids: dict[bytes, str] = {}
        for number, line in enumerate(data.splitlines(), 1):
            line = line.strip()
            if line and not line.startswith(b"#"):
                name, key = _parsed(line, f"{path}, line {number}")
                digest = hashlib.sha256(key).digest()
                ids[digest] = name or f"key-{digest.hex()[:8]}"
                if len(key) < SHORT_KEY:
                    warnings.warn(
                        f"{path}, line {number}: the key has {len(key)} characters; better: {SHORT_KEY} random ones or "
                        "more",
                        stacklevel=2,
                    )
        if not 1 <= len(ids) <= MOST_KEYS:
            raise ValueError(f"{path} has {len(ids)} keys; accepted: 1 to {MOST_KEYS:,}, one per line")
        return cls(ids)

    def find(self, key: bytes) -> str | None:
        """The id of a key that was presented; the time taken does not depend on how much of a key is right."""
        digest, found = hashlib.sha256(key).digest(), None
        for known, name in self._ids.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found


def _parsed(line: bytes, place: str) -> tuple[str, bytes]:
    name, separator, key = line.partition(b":")
    if not separator:
        name, key = b"", line
    text = name.strip().decode("utf-8", "replace")
    if separator and not (text.replace("-", "").replace("_", "").replace(".", "").isalnum() and text.isascii()):
        raise ValueError(f"{place}: the name of a key has other characters than letters, digits, '.', '_' and '-'")
    if len(text) > LONGEST_NAME:
        raise ValueError(f"{place}: the name of a key is longer than {LONGEST_NAME} characters")
    key = key.strip()
    if not key or any(not 0x21 <= byte <= 0x7E for byte in key):
        raise ValueError(f"{place}: no key, or one with other characters than visible ASCII")
    return text, key
