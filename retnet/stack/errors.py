"""What is wrong with a stack file, told in three lines a fault, every fault of the file at once.

    Category: path: what is wrong (line L, column C)
    Fix: what to write instead
    See: where it is explained

A path is dotted, with [i] for list items: `layer_schedule[1].override.ffn.activation`; the whole file is `root`. A
fault of a key (unknown, missing, repeated) is reported at the mapping that holds it, a fault of a value at the value.
Text taken from a file is escaped and shortened, so that no name or value can break the three lines.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

Path = tuple[str | int, ...]

GUIDE = "docs/stack.md"
# The guide's sections, by the keys on a path; the last key of a path that is listed decides.
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
    """The first word of a fault."""

    VALIDATION = "ValidationError"
    COMPATIBILITY = "CompatibilityError"
    UNSUPPORTED = "UnsupportedError"


@dataclass(frozen=True)
class Mark:
    """A place in a file, both counted from 1."""

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
    topic: str = ""  # the guide's section, where the path does not tell it

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
    """A stack that cannot be used. `problems` holds every fault found, in the order of the file."""

    def __init__(self, problems: Iterable[Fault], origin: str = "") -> None:
        self.problems: tuple[Fault, ...] = tuple(problems)
        self.origin = origin
        super().__init__("\n\n".join(str(problem) for problem in self.problems))


def guide_section(path: Path, category: Category) -> str:
    """The section of the guide that explains this part of a file."""
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
    """The text on one line, unprintable characters escaped, shortened to about `limit` characters."""
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def show(value: object) -> str:
    """A value of a file as an error shows it: text in quotes, YAML's spelling for the rest."""
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
    """'a, b, c' from names of a file or of the schema."""
    return ", ".join(plain(name) for name in names)


def nearest(name: object, candidates: Sequence[str]) -> str | None:
    """The candidate most like `name`, None if nothing is near."""
    if not isinstance(name, str):
        return None
    return next(iter(difflib.get_close_matches(name[:100], candidates, n=1, cutoff=0.6)), None)
