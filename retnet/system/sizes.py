"""Byte counts in words, in binary units."""

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_bytes(count: float, digits: int = 4) -> str:
    """4194304 -> '4 MiB', with at most `digits` significant digits, or all four of 1000 to 1023."""
    size, unit = float(count), UNITS[0]
    for larger in UNITS[1:]:
        if abs(size) < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.{max(digits, 4) if abs(size) >= 1000 else digits}g} {unit}"
