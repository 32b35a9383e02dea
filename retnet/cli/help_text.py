"""Examples in the help: every verb's docstring has a line `Example: retnet ...`, which lists of verbs show too."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from rich.markup import escape

EXAMPLE = "Example: "


def example_of(text: str) -> str | None:
    """The command line of the example in a docstring; a line that ends in a backslash goes on in the next one."""
    found = re.search(rf"^{EXAMPLE}((?:.*\\\n)*.*)$", text, re.MULTILINE)
    return None if found is None else re.sub(r"\s*\\\n\s*", " ", found[1])


def short_help(verb: Callable[..., Any] | str) -> str:
    """The first paragraph of a verb's docstring (or of a help text), and below it the example."""
    text = verb if isinstance(verb, str) else inspect.getdoc(verb) or ""
    summary, example = " ".join(text.split("\n\n")[0].split()), example_of(text)
    return escape(summary) if example is None else f"{escape(summary)}\n[dim]{escape(example)}[/]"


def all_examples(command: Any, path: tuple[str, ...] = ("retnet",)) -> Iterator[tuple[str, str | None]]:
    """Every verb below a click command, with the example of its help."""
    for name, inner in getattr(command, "commands", {}).items():
        yield " ".join([*path, name]), example_of(inspect.cleandoc(inner.help or ""))
        yield from all_examples(inner, (*path, name))
