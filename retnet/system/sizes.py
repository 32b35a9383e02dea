"""Byte counts in words, in binary units, and read from words; other counts, with separators."""

import math
import re
from collections.abc import Iterable

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_bytes(count: float, digits: int = 4) -> str:
    """4194304 -> '4 MiB', with at most `digits` significant digits, or all four of 1000 to 1023."""
    size, unit = float(count), UNITS[0]
    for larger in UNITS[1:]:
        if abs(size) < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.{max(digits, 4) if abs(size) >= 1000 else digits}g} {unit}"


def format_count(count: int) -> str:
    """3412 -> '3,412'; from a million in millions: 19950300 -> '19.95M'."""
    return f"{count:,}" if count < 10**6 else f"{count / 10**6:,.2f}M"


def quantity(number: int, noun: str, plural: str = "") -> str:
    """1 -> '1 token', 3412 -> '3,412 tokens'; the plural has an s unless it is given."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def parse_bytes(text: str) -> int:
    """'8GiB' -> 8589934592. Units are binary (KiB, MiB, GiB, TiB) or decimal (KB, MB, GB, TB), in any case; none is
    bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b?)?\s*", text, re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"the size is {text[:80]!r}; accepted: bytes, or a number with a unit, such as 8GiB or 500MB")
    power = "kmgt".index(match[2].lower()) + 1 if match[2] else 0
    return math.floor(float(match[1]) * (1024 if match[3] else 1000) ** power)


def spans(numbers: Iterable[int]) -> str:
    """'0 to 2, 5': ascending numbers, those that follow each other as a span."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1][1:] = [number]
        else:
            found.append([number])
    return ", ".join(" to ".join(map(str, span)) for span in found)
