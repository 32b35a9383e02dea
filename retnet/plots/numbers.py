"""Numbers as pictures and tables write them: tokens in powers of two, counts in decimal units, bytes in binary ones."""

from __future__ import annotations

from retnet.system.sizes import format_bytes


def tokens(count: float) -> str:
    """32768 -> '32K', 2097152 -> '2M' where that is exact; otherwise all digits, as in '1,500'."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if count >= size and count % size == 0:
            return f"{count / size:,.0f}{unit}"
    return f"{count:,g}" if count < 1e6 else f"{count:,.0f}"


def short(count: float, digits: int = 4) -> str:
    """1500000 -> '1.5M': decimal units, for tokens of training, parameters and documents."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:.{digits}g}{unit}"
    return f"{count:.{digits}g}"


def plain(value: float) -> str:
    """12000 -> '12,000', 0.02 -> '0.02'."""
    return f"{value:,.10g}"


def bytes_of(count: float) -> str:
    """1572864 -> '1.5 MiB'."""
    return format_bytes(count, digits=3)
