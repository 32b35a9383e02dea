"""Checks of values that callers hand over, and their short form in messages."""

import math
import os
from collections.abc import Iterable, Mapping, Sized
from itertools import islice
from numbers import Integral, Real
from pathlib import Path

LONGEST_QUOTE = 80  # characters of a wrong value in a message
MOST_ITEMS = 2**28  # of a sequence that is copied
MOST_ITEMS_OF_ITERATOR = 2**24  # it does not say its length, and may be endless


def quoted(value: object) -> str:
    """The value as far as a message has room for it; its type where it cannot be shown."""
    try:
        text = repr(value)
    except Exception:  # the caller's own class, or an integer of thousands of digits
        return f"a {type(value).__name__}"
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}... ({type(value).__name__})"


def is_integer(value: object, low: float, high: float = math.inf) -> bool:
    """Whether the value is an integer from low to high; booleans are not."""
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


def is_number(value: object, low: float, high: float) -> bool:
    """Whether the value is a real number from low to high that a float holds; booleans and NaN are not."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return low <= float(value) <= high
    except OverflowError:
        return False


def copied(name: str, values: object, accepted: str) -> list:
    """The items of an iterable, such as a generator, an array or a tensor, as a list of our own.

    Raises ValueError, naming it, for text, bytes, mappings and single values, for what cannot be read, and for more
    than MOST_ITEMS items (MOST_ITEMS_OF_ITERATOR of an iterator).
    """
    limit = MOST_ITEMS if isinstance(values, Sized) else MOST_ITEMS_OF_ITERATOR
    items = None
    try:
        if isinstance(values, (str, bytes, bytearray, Mapping)) or not isinstance(values, Iterable):
            raise TypeError
        if not isinstance(values, Sized) or len(values) <= limit:
            items = list(islice(values.tolist() if hasattr(values, "tolist") else values, limit + 1))  # pyright: ignore
    except Exception as error:  # also from the caller's own iterator
        reason = "" if isinstance(error, TypeError) else f", which cannot be read ({error!r})"
        raise ValueError(f"{name} is {quoted(values)}{reason}; accepted: {accepted}") from error
    if items is None or len(items) > limit:
        raise ValueError(f"{name} is {quoted(values)}, of more than {limit:,} items; accepted: {accepted}, not as many")
    return items


def copied_integers(name: str, values: object, low: int, high: int, accepted: str) -> tuple[int, ...]:
    """The integers from low to high of an iterable, NumPy's included. Raises ValueError, naming it."""
    items = copied(name, values, accepted)
    if not set(map(type, items)) <= {int}:
        if wrong := [item for item in items if not is_integer(item, -math.inf)]:
            raise ValueError(f"{name} is a sequence with {quoted(wrong[0])} in it; accepted: {accepted}")
        items = [int(item) for item in items]
    if items and not low <= min(items) <= max(items) <= high:
        wrong = next(item for item in items if not low <= item <= high)
        raise ValueError(f"{name} has {quoted(wrong)} in it; accepted: {accepted}")
    return tuple(items)


def as_path(name: str, value: object) -> Path:
    """A path from text or a path. Raises ValueError, naming it, for anything else and for no text."""
    if not isinstance(value, (str, os.PathLike)) or value == "":
        raise ValueError(f"{name} is {quoted(value)}; accepted: a path")
    return Path(value)
