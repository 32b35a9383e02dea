"""YAML documents as plain values, with the line and column of every key and value.

PyYAML's SafeLoader composes the nodes (YAML 1.1). They are converted to values here, because PyYAML's constructor
silently keeps the last of two equal keys and drops line and column. A stack consists of null, booleans, integers,
floats, text, lists, and mappings with text keys; merge keys (`<<`) and aliases work. Size, depth, nodes and aliases are
limited before values are built, so that no file can take much time or memory.
"""

from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.constructor import SafeConstructor

from .errors import Fault, Mark, Path, StackError, plain, show

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_NODES = 20_000
MAX_ALIASES = 200
LARGEST_INTEGER = 2**63 - 1

_TAG = "tag:yaml.org,2002:"


@dataclass
class Document:
    """The root value, the marks of its keys and values, and the faults found while reading it."""

    root: Any = None
    values: dict[Path, Mark] = field(default_factory=dict)
    keys: dict[Path, Mark] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    broken: set[Path] = field(default_factory=set)  # values with a reported fault: its consequences are not reported
    incomplete: set[Path] = field(default_factory=set)  # mappings with a reported fault in a key

    def mark(self, path: Path, *, key: bool = False) -> Mark | None:
        """The place of the value (or the key) at `path`; if it is missing, that of its mapping."""
        here = self.keys if key else self.values
        while path and path not in here:
            path, here = path[:-1], self.keys
        return here.get(path) or self.values.get(())

    def is_broken(self, path: Path) -> bool:
        return any(path[:length] in self.broken for length in range(len(path) + 1))


class _BoundedLoader(yaml.SafeLoader):
    """A SafeLoader that stops at the first node beyond the limits."""

    depth = nodes = aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        self.depth += 1
        self.nodes += 1
        self.aliases += isinstance(event, yaml.AliasEvent)
        for count, limit, name in (
            (self.depth, MAX_DEPTH, "levels of nesting"),
            (self.nodes, MAX_NODES, "values"),
            (self.aliases, MAX_ALIASES, "aliases"),
        ):
            if count > limit:
                raise yaml.MarkedYAMLError(problem=f"more than {limit} {name}", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _mark(yaml_mark: Any) -> Mark:
    return Mark(yaml_mark.line + 1, yaml_mark.column + 1)


def read_text(data: bytes, origin: str = "") -> str:
    """The file's text. Raises StackError if it is too large or not UTF-8."""
    _check_size(len(data), origin)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        fault = Fault((), "the file is not UTF-8 text", "save it as UTF-8", mark=Mark(line, column))
        raise StackError([fault], origin) from None


def _check_size(size: int, origin: str) -> None:
    if size > MAX_BYTES:
        what = f"the file has {size} bytes, more than the {MAX_BYTES} a stack file may have"
        raise StackError([Fault((), what, "write a repeated layer once, with `repeat`")], origin)


def parse(text: str, origin: str = "") -> Document:
    """A stack's YAML text, of at most MAX_BYTES in UTF-8.

    Raises StackError if it is longer, not YAML, or not one document with a mapping at its root. Smaller faults
    (repeated keys, dates, numbers out of range) are collected in `faults`.
    """
    _check_size(len(text.encode("utf-8", "surrogatepass")), origin)
    document = compose(text, origin)
    if not isinstance(document.root, dict):
        mark = document.values.get((), Mark(1, 1))
        what = f"a stack is a mapping, this file holds {show(document.root)}"
        fix = "start the file with `schema_version: 1` and the sections model, tokenizer_contract, embedding, ..."
        raise StackError([Fault((), what, fix, mark=mark)], origin)
    return document


def compose(text: str, origin: str = "") -> Document:
    """Any YAML text. Raises StackError if it is not one YAML document; smaller faults are collected in `faults`."""
    loader: _BoundedLoader | None = None
    try:
        loader = _BoundedLoader(text)
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        raise StackError([_yaml_fault(error, text)], origin) from None
    finally:
        if loader is not None:
            loader.dispose()
    reader = _NodeReader()
    if node is not None:
        reader.document.root = reader.read(node, ())
    return reader.document


def _yaml_fault(error: yaml.YAMLError, text: str) -> Fault:
    if isinstance(error, yaml.MarkedYAMLError):
        what = " ".join(part for part in (error.context, error.problem) if part)
        at = error.problem_mark or error.context_mark
        mark = _mark(at) if at else None
    else:  # a character YAML does not allow
        position = getattr(error, "position", 0)
        what = f"the character {text[position : position + 1]!a} is not allowed in YAML"
        mark = Mark(text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position))
    return Fault((), f"this is not YAML that can be read: {plain(what, 200)}", "correct it here", mark=mark)


class _NodeReader:
    """Converts nodes to values, and records the place of each."""

    def __init__(self) -> None:
        self.document = Document()
        self._scalars = SafeConstructor()
        self._open: set[int] = set()  # the nodes being read, to detect an alias inside its own anchor
        self._count = 0

    def read(self, node: yaml.Node, path: Path) -> Any:
        self.document.values[path] = _mark(node.start_mark)
        self._count += 1
        if id(node) in self._open:
            return self._refuse(path, "an alias is inside the value that it repeats", "write the value out")
        if self._count > MAX_NODES:
            # Aliases of aliases can make any number of values from few nodes.
            what = f"more than {MAX_NODES} values once aliases are written out"
            raise StackError([Fault(path, what, "use fewer aliases", mark=_mark(node.start_mark))])
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        self._open.add(id(node))
        try:
            if node.tag == _TAG + "map" and isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if node.tag == _TAG + "seq" and isinstance(node, yaml.SequenceNode):
                return [self.read(item, (*path, i)) for i, item in enumerate(node.value)]
        finally:
            self._open.discard(id(node))
        return self._refuse(path, f"the tag {plain(node.tag)} has no meaning here", "remove the tag")

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if kind in ("str", "null"):
            return node.value if kind == "str" else None
        if kind not in ("bool", "int", "float"):
            hint = "put it in quotes" if kind in ("timestamp", "value", "merge") else "remove the tag"
            return self._refuse(path, f"{show(node.value)} is read as a {plain(kind)}", hint)
        try:
            value = getattr(self._scalars, f"construct_yaml_{kind}")(node)
        except (ValueError, KeyError, IndexError, OverflowError):
            # Text that does not fit its tag (`!!int x`), or has more digits than Python converts.
            return self._refuse(path, f"{show(node.value)} is not a usable {kind}", "write a plain number or text")
        if kind == "int" and abs(value) > LARGEST_INTEGER:
            return self._refuse(path, "the integer is too large", f"write at most {LARGEST_INTEGER}")
        if kind == "float" and not abs(value) < float("inf"):
            return self._refuse(path, f"{show(node.value)} is not a finite number", "write a finite number")
        return value

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                merged += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                continue
            mark = _mark(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
                shown = show(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                fix = "put it in quotes (YAML reads numbers, dates, yes, no, on, off and null unquoted)"
                self.document.faults.append(Fault(path, f"the key {shown} is not text", fix, mark=mark))
                self.document.incomplete.add(path)
            elif key_node.value in mapping:
                what = f"the key '{plain(key_node.value)}' is given twice"
                self.document.faults.append(Fault(path, what, "keep one of the two", mark=mark))
            elif "${" in key_node.value:
                what = f"the key {show(key_node.value)} contains an expression; only values may"
                self.document.faults.append(Fault(path, what, "write the key out", mark=mark))
                self.document.incomplete.add(path)
            else:
                self.document.keys[*path, key_node.value] = mark
                mapping[key_node.value] = self.read(value_node, (*path, key_node.value))
        for base in merged:
            self._merge(base, mapping, path)
        return mapping

    def _merge(self, base: yaml.Node, mapping: dict[str, Any], path: Path) -> None:
        """`<<: *base`: add the keys of `base` that the mapping does not have."""
        if not isinstance(base, yaml.MappingNode):
            fault = Fault(path, "`<<` can merge mappings only", "merge a mapping", mark=_mark(base.start_mark))
            self.document.faults.append(fault)
            return
        before = {key: self.document.keys[*path, key] for key in mapping}
        marks = {p: m for p, m in self.document.values.items() if p[: len(path)] == path}
        merged = self.read(base, path)
        if isinstance(merged, dict):
            for key, value in merged.items():
                mapping.setdefault(key, value)
        self.document.values.update(marks)
        self.document.keys.update({(*path, key): mark for key, mark in before.items()})

    def _refuse(self, path: Path, what: str, fix: str) -> None:
        self.document.faults.append(Fault(path, what, fix, mark=self.document.values[path]))
        self.document.broken.add(path)
