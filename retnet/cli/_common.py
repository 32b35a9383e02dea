"""Terminal output, error messages and input that all verbs share."""

from __future__ import annotations

import json
import re
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from retnet.system.progress import Progress
from retnet.system.suggest import did_you_mean_path

if TYPE_CHECKING:
    from retnet.models.lm import LanguageModel

# FORCE_COLOR, which notebooks set, asks for colours in a pipe, not for bars and the prompt.
console = Console(force_interactive=None if sys.stdout.isatty() else False)
errors = Console(stderr=True, force_interactive=None if sys.stderr.isatty() else False)
silent = Console(quiet=True)

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "\\": "\\"}


@dataclass
class Session:
    """Options of the whole command line."""

    debug: bool = False


def report_error(error: Exception) -> None:
    """Print what was wrong with the input, in one message; for an error that another library raised, also how to find
    the place. Messages of our own say what was given and what is accepted.
    """
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        if isinstance(error, FileNotFoundError) and isinstance(error.filename, str):
            text += did_you_mean_path(error.filename)
    errors.print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)
    if not _is_our_message(error):
        errors.print("[dim]`retnet --debug VERB ...` shows where it came from[/]")


def _is_our_message(error: Exception) -> bool:
    """Whether this package raised the error, or the operating system did and names the file."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return True
    frames = list(walk_tb(error.__traceback__))
    return bool(frames) and frames[-1][0].f_globals.get("__name__", "").partition(".")[0] == "retnet"


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print warnings about sources as one line each, without the place in the code."""
    from retnet.data.sources import SourceWarning

    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
            if issubclass(category, SourceWarning):
                errors.print(f"[yellow]warning:[/] {escape(str(message))}", soft_wrap=True, highlight=False)
            else:
                others(message, category, *place, **options)

        warnings.simplefilter("always", SourceWarning)
        warnings.showwarning = show
        yield


def load_shown(model: str, device: str, dtype: str | None = None, *, quiet: bool = False) -> LanguageModel:
    """As `retnet.load`, with its progress unless quiet."""
    with Progress(silent if quiet else errors, f"loading {model}"):
        from retnet.api import load

        return load(model, device, dtype)


def read_text(text: str | None, file: Path | None) -> bytes | None:
    """Input given as an argument, as a file (`-` is standard input), or piped in; None if given in no way.

    Raises ValueError if both an argument and a file were given, OSError if the file cannot be read.
    """
    if text is not None and file is not None:
        raise ValueError("the text is given as an argument and as --file; accepted: one of the two, not both")
    if text is not None:
        return text.encode("utf-8", "surrogateescape")
    if file is not None and str(file) != "-":
        return file.read_bytes()
    if sys.stdin is None or (file is None and sys.stdin.isatty()):
        return None
    return sys.stdin.buffer.read()


def write_text(text: str) -> None:
    """Text on standard output at once; characters that its encoding lacks become question marks."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def printable(text: str) -> str:
    """Text without control characters, by which a model could take over the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\N{REPLACEMENT CHARACTER}" for c in text)


def unescape(text: str) -> str:
    r"""\n, \t, \r, \0 and \\ as the characters they stand for."""
    return re.sub(r"\\([ntr0\\])", lambda match: _ESCAPES[match[1]], text)


def print_json(data: object) -> None:
    """Data on standard output, for programs."""
    print(json.dumps(data, indent=2))
