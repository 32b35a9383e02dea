"""The parts of pages that are written from the program: a comment `<!-- generated: NAME -->` stands for each."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import TypeAdapter, ValidationError


def fill(text: str, root: Path) -> str:
    """A page's text with its generated parts. Raises ValueError for an unknown name."""

    def part(match: re.Match[str]) -> str:
        if match[1] not in PARTS:
            raise ValueError(f"generated: {match[1]}; accepted: {', '.join(PARTS)}")
        return PARTS[match[1]](root)

    return re.sub(r"^<!-- generated: ([\w-]+) -->$", part, text, flags=re.MULTILINE)


def command_line(root: Path) -> str:
    """Every verb with its options, by Typer's own writer of documentation."""
    words = [sys.executable, "-m", "typer", "retnet.cli", "utils", "docs", "--name", "retnet"]
    text = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True).stdout
    text = text[text.index("**Usage**") :]  # the page has the heading
    text = re.sub(r"^(Examples?): (retnet .*)$", r"\1:\n\n```console\n$ \2\n```", text, flags=re.MULTILINE)
    return re.sub(r"<(?=[a-z\[\]]+( range)?>`)", " <", text)


def stack_schema(root: Path) -> str:
    """The keys of a stack file, section by section, with the values that the program accepts."""
    from retnet.stack.schema import Spec

    return "\n".join(_section(Spec, "the whole file", "file", set()))


def _section(section: Any, title: str, path: str, seen: set[str]) -> Iterator[str]:
    yield f"## {title}\n\n| key | accepted | default |\n|---|---|---|"
    inner = []
    for key, info in _fields(section):
        found = _sections_in(info.annotation)
        where = key if path == "file" else f"{path}.{key}"
        if get_origin(info.annotation) is dict:
            where += ".NAME"
        elif get_origin(info.annotation) is list and found:
            where += "[]"
        inner += [(one, where) for one in found]
        accepted = f"section [`{where}`](#{_anchor(where)})" if found else _accepted(info)
        yield f"| `{key}` | {accepted} | {'required' if info.is_required() else _value(info.default)} |"
    yield ""
    for one, where in inner:
        if where not in seen:
            seen.add(where)
            yield from _section(one, f"`{where}`", where, seen)


def _fields(section: Any) -> Iterator[tuple[str, Any]]:
    known = section.with_known_mixers() if hasattr(section, "with_known_mixers") else section
    for name, info in known.model_fields.items():
        yield info.alias or name, info


def _sections_in(annotation: Any) -> list[Any]:
    from retnet.stack.section import Section

    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _sections_in(inner)]


def _accepted(info: Any) -> str:
    """What the program says is accepted, when it refuses a value that nothing accepts."""
    annotation = info.annotation
    if get_origin(annotation) is list:
        (item,) = get_args(annotation)
        return f"a list of: {_refusal(item)}"
    return _refusal(annotation, info.metadata)


def _refusal(annotation: Any, metadata: list[Any] | None = None) -> str:
    from typing import Annotated

    whole = Annotated[annotation, *metadata] if metadata else annotation
    try:
        TypeAdapter(whole).validate_python({"no": {"such": "value"}})
    except ValidationError as error:
        context = error.errors()[0].get("ctx", {})
        what, fix = context.get("what", ""), context.get("fix", "")
        expected = re.match(r"expected (.*), got ", what)
        options = re.search(r"write (?:one of: )?(.*)$", fix)
        words = options[1] if not expected or "one of: " in fix else expected[1]
        return words.replace("|", "\\|").replace("<", "&lt;")
    raise ValueError(f"{annotation} accepts every value")


def _value(default: Any) -> str:
    if default is None:
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _anchor(where: str) -> str:
    return re.sub(r"[^\w\- ]", "", where.lower())


def api(root: Path) -> str:
    """The public names of the package, for mkdocstrings, which reads their docstrings."""
    from retnet import _EXPORTS

    return "\n\n".join(f"::: {module}.{name}" for name, module in _EXPORTS.items())


PARTS: dict[str, Callable[[Path], str]] = {"command-line": command_line, "stack-schema": stack_schema, "api": api}
