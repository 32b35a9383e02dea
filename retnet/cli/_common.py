"""What the verbs share: the terminal, errors, and reading a command's input."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

console = Console()
errors = Console(stderr=True)


@dataclass
class Session:
    """What holds for a whole command line."""

    debug: bool = False


def report_error(error: Exception) -> None:
    """Print what was wrong with the input, in one message."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    errors.print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)
    errors.print("[dim]`retnet --debug VERB ...` shows where it came from[/]")


def read_text(text: str | None, file: Path | None) -> bytes:
    """Input given in one of three ways: as an argument, as a file (`-` is standard input), or piped in.

    Raises ValueError if both or nothing was given.
    """
    if text is not None and file is not None:
        raise ValueError("the text comes from an argument or from --file, not from both")
    if text is not None:
        return text.encode()
    if file is not None and str(file) != "-":
        return file.read_bytes()
    if file is None and sys.stdin.isatty():
        raise ValueError("no text: give it as an argument, with --file, or on standard input")
    return sys.stdin.buffer.read()
