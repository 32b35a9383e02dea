"""Suggestions for mistyped names: the accepted name that was probably meant, as error messages put it."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

LONGEST_NAME = 100  # characters that are compared; a caller may send more
SHORTEST_WORD = 3  # characters that suffice to find a name by its part, such as 13b
MOST_SIBLINGS = 1000  # names of a folder that are compared


def nearest(name: object, accepted: Iterable[str]) -> str | None:
    """The accepted name most similar to `name`, or the shortest that contains its words; None if there is none.

    Upper and lower case count as the same.
    """
    if not isinstance(name, str):
        return None
    given = name[:LONGEST_NAME].casefold()
    names = {each.casefold(): each for each in reversed(list(accepted))}  # of equal ones the first
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    if not close and len(given) >= SHORTEST_WORD:
        words = re.split(r"[-_.]", given)
        containing = (each for each in names if all(word in each for word in words))
        close = sorted(containing, key=lambda each: (len(each), each))
    return names[close[0]] if close else None


def did_you_mean(name: object, accepted: Iterable[str]) -> str:
    """`; did you mean 'x'?` to end a message with, or nothing."""
    near = nearest(name, accepted)
    return "" if near is None or near == name else f"; did you mean {near!r}?"


def choices(name: object, accepted: Iterable[str]) -> str:
    """`accepted: a, b, c; did you mean 'b'?` of a list short enough to be read."""
    accepted = list(accepted)
    return f"accepted: {', '.join(accepted)}{did_you_mean(name, accepted)}"


def did_you_mean_path(path: str | Path, names: Iterable[str] = ()) -> str:
    """The same for a path that does not exist: the nearest of `names`, which are accepted in its place, and of the
    paths in its folder. Nothing where the folder does not exist either.
    """
    if meant := did_you_mean(str(path), names):
        return meant
    missing = Path(path)
    try:
        with os.scandir(missing.parent) as entries:
            siblings = sorted(each.name for each in islice(entries, MOST_SIBLINGS))
    except OSError:
        return ""
    near = nearest(missing.name, siblings)  # whole paths would be alike for their folder
    return "" if near is None else f"; did you mean {str(missing.parent / near)!r}?"
