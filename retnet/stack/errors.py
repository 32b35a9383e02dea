"""Faults of a stack file: three lines each, all faults of the file at once.

    Category: path: what is wrong (line L, column C)
    Fix: what to write instead
    See: the section of the guide

A path is dotted, with [i] for list items: `layer_schedule[1].override.ffn.activation`; the whole file is `root`. A
fault of a key (unknown, missing, repeated) is reported at its mapping, a fault of a value at the value. Text from the
file is escaped and shortened, so that no name or value can break the three lines.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

Path = tuple[str | int, ...]

GUIDE = "docs/reference/stack.md"
# The guide's sections by key. The last key of a path that is listed here, or is a mixer, selects the section.
_SECTIONS = {
    "let": "let",
    "model": "model",
    "tokenizer_contract": "tokenizer_contract",
    "embedding": "embedding",
    "layer_templates": "layer_templates",
    "mixer": "mixer",
    "ffn": "ffn",
    "moe": "moe",
    "norm": "norm-residual-state",
    "residual": "norm-residual-state",
    "state": "norm-residual-state",
    "layer_schedule": "layer_schedule",
    "override": "override",
    "head": "head",
    "training_hints": "training_hints",
    "compatibility": "compatibility",
}


class Category(StrEnum):
    """The kind of a fault, the first word of its text."""

    VALIDATION = "ValidationError"
    COMPATIBILITY = "CompatibilityError"
    UNSUPPORTED = "UnsupportedError"


@dataclass(frozen=True)
class Mark:
    """A place in a file. Lines and columns are counted from 1."""

    line: int
    column: int


@dataclass(frozen=True)
class Fault:
    """One fault of a stack file."""

    path: Path
    what: str
    fix: str
    category: Category = Category.VALIDATION
    mark: Mark | None = None
    topic: str = ""  # the guide's section, if the path does not determine it

    @property
    def dotted(self) -> str:
        return format_path(self.path)

    @property
    def see(self) -> str:
        return f"{GUIDE}#{self.topic or guide_section(self.path, self.category)}"

    def __str__(self) -> str:
        place = f" (line {self.mark.line}, column {self.mark.column})" if self.mark else ""
        return f"{self.category}: {self.dotted}: {self.what}{place}\nFix: {self.fix}\nSee: {self.see}"


class StackError(ValueError):
    """A stack with faults. `faults` lists all of them, in the order of the file."""

    def __init__(self, faults: Iterable[Fault], origin: str = "") -> None:
        self.faults: tuple[Fault, ...] = tuple(faults)
        self.origin = origin
        super().__init__("\n\n".join(str(fault) for fault in self.faults))


def guide_section(path: Path, category: Category) -> str:
    """The section of the guide that explains a path."""
    if category is Category.UNSUPPORTED:
        return "not-supported"
    from .mixers import MIXERS  # not at the top: the mixers import this module

    sections = _SECTIONS | {name: settings.GUIDE for name, settings in MIXERS.items()}
    known = [sections[key] for key in path if isinstance(key, str) and key in sections]
    return known[-1] if known else "files"


def format_path(path: Path) -> str:
    """('layer_schedule', 1, 'repeat') -> 'layer_schedule[1].repeat'; () -> 'root'."""
    if not path:
        return "root"
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{plain(key)}" if text else plain(key)
    return text


def plain(text: str, limit: int = 80) -> str:
    """Text on one line, shortened to about `limit` characters, with unprintable characters escaped."""
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def show(value: object) -> str:
    """A value as errors show it: text in quotes, other values as YAML spells them."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return f"'{plain(value, 60)}'"
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case _:
            return plain(str(value), 60)


def listing(names: Iterable[str]) -> str:
    """Names as 'a, b, c'."""
    return ", ".join(plain(name) for name in names)
