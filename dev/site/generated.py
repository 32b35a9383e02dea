"""The parts of pages that are written from the program: a comment `<!-- generated: NAME -->` stands for each."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

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
    return re.sub(
        r"^(Examples?): (retnet .*)$", r"\1:\n\n```console\n$ \2\n```", _whole_summaries(text), flags=re.MULTILINE
    )


def _whole_summaries(text: str) -> str:
    """Lists of commands with links, and with the first line of each command's section, which Typer cuts short."""
    first = dict(re.findall(r"^##+ `retnet ([\w ]+)`\n\n(.+)$", text, re.MULTILINE))
    parts = re.split(r"^(##+ `retnet [\w ]+`)$", text, flags=re.MULTILINE)  # a text, then pairs of heading and text
    verbs = ["", *(re.findall(r"`retnet ([\w ]+)`", heading)[0] + " " for heading in parts[1::2])]
    for n, verb in enumerate(verbs):

        def line(match: re.Match[str], verb: str = verb) -> str:
            name = verb + match[1]
            return f"* [`{match[1]}`](#retnet-{name.replace(' ', '-')}): {first[name]}"

        parts[2 * n] = re.sub(r"^\* `(\w+)`: .*$", line, parts[2 * n], flags=re.MULTILINE)
    return "".join(parts)


def stack_schema(root: Path) -> str:
    """The keys of a stack file, section by section, with the values that the program accepts."""
    from retnet.stack.schema import Spec

    return "\n".join(_section(Spec, ""))


def _section(section: Any, path: str) -> Iterator[str]:
    if path:
        yield f"## `{_short(path)}`\n\n`{path}`\n"
    yield "| key | accepted | default |\n|---|---|---|"
    inner = []
    for key, info in _fields(section):
        found = _section_in(info.annotation)
        where = f"{path}.{key}" if path else key
        if found is None:
            accepted = _accepted(info)
        else:
            where += {dict: ".NAME", list: "[]"}.get(get_origin(info.annotation), "")
            inner.append((found, where))
            accepted = f"[`{_short(where)}`](#{_anchor(where)})"
        yield f"| `{key}` | {accepted} | {'required' if info.is_required() else _value(info.default)} |"
    yield ""
    for one, where in inner:
        yield from _section(one, where)


def _fields(section: Any) -> Iterator[tuple[str, Any]]:
    known = section.with_known_mixers() if hasattr(section, "with_known_mixers") else section
    for name, info in known.model_fields.items():
        yield info.alias or name, info


def _section_in(annotation: Any) -> Any:
    """The section in an annotation such as `list[Entry]` or `Norm | None`; None without one."""
    from retnet.stack.section import Section

    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


def _accepted(info: Any) -> str:
    """What the program says is accepted, when it refuses a value that nothing accepts."""
    if get_origin(info.annotation) is list:
        return f"a list of: {_refusal(*get_args(info.annotation))}"
    return _refusal(Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation)


def _refusal(annotation: Any) -> str:
    try:
        TypeAdapter(annotation).validate_python({"no": {"such": "value"}})
    except ValidationError as error:
        context = error.errors()[0].get("ctx", {})
        what, fix = context.get("what", ""), context.get("fix", "")
        expected = re.match(r"expected (.*), got ", what)
        words = expected[1] if expected and "one of: " not in fix else re.split(r"write (?:one of: )?", fix)[-1]
        return words.replace("|", "\\|").replace("<", "&lt;")
    raise ValueError(f"{annotation} accepts every value")


def _value(default: Any) -> str:
    if default is None:
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _short(path: str) -> str:
    """The last two names of a path, in which NAME and [] say nothing."""
    return ".".join([name for name in path.replace("[]", "").split(".") if name != "NAME"][-2:])


def _anchor(path: str) -> str:
    return re.sub(r"[^\w\- ]", "", _short(path).lower())


# What the pages use beside the names of `import retnet`, under the names to import them by.
BEYOND = (
    "retnet.models.states.ModelState",
    "retnet.layers.retention.RetentionConfig",
    "retnet.stack.load.load_stack",
    "retnet.data.corpus.open_corpus",
    "retnet.data.packing.PackedDataset",
    "retnet.data.mixture.Mixture",
    "retnet.eval.perplexity.perplexity",
    "retnet.models.convert.convert",
    "retnet.models.export.export_onnx",
    "retnet.models.export.export_step",
    "retnet.models.decode.int8.quantize_int8_",
)


def api(root: Path) -> str:
    """The names of the package, for mkdocstrings, which reads their docstrings."""
    from retnet import _EXPORTS

    public = [f"::: {module}.{name}" for name, module in _EXPORTS.items()]
    beyond = [f"::: {name}\n    options:\n      show_root_full_path: true" for name in BEYOND]
    return "\n\n".join([*public, *beyond])


PARTS: dict[str, Callable[[Path], str]] = {"command-line": command_line, "stack-schema": stack_schema, "api": api}
