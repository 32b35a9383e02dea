"""Random files: each gives a stack that can be built, or faults of three lines each, and never another exception."""

import copy
import functools
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet.stack import StackError, parse_stack
from retnet.stack.build import model_config
from retnet.stack.document import read_text
from retnet.stack.report import realism_report

from .specs import BASE
from .test_stack_corpus import CORPUS, catalogue

SOURCES = [BASE] + [(CORPUS / "valid" / name).read_text() for name in catalogue("valid")]

# Tokens that are special in YAML, in Python, or in the schema.
NASTY = [
    "null", "~", "true", "no", "0", "-1", "1.5", ".nan", ".inf", "1e9", "3e-4", "9" * 30, "0x7f", "1:30", "2001-01-01",
    "''", "' '", "[]", "{}", "[[]]", "{a: {}}", "- x", "? x", "*a", "&a x", "<<: *a", "!!int x", "!t", "%", "@", "`",
    "|", ">", "...", "---", "${", "${}", "${1/0}", "${let.x}", "'${1}'", "x${1}", "\t", "\0", "\ufeff", "\ud7ff",
    "é", "# c", "mlp", "moe", "hyena", "mamba", "retnet", "attention", "branched", "parallel", "let: {}", "vendor.x",
    "vendor.retnet.decay: gated",
]  # fmt: skip

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(NASTY)
keys = st.integers() | st.booleans() | st.text(max_size=8) | st.sampled_from(NASTY)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=6
)


def check(text: str) -> None:
    stack, faults = None, ()
    try:
        stack = parse_stack(text)
    except StackError as error:
        faults = error.faults
    assert stack or faults
    for fault in faults:
        assert len(str(fault).splitlines()) == 3
        assert fault.mark is not None
        assert fault.what
        assert fault.fix
    if stack:
        assert stack.layers
        assert realism_report(stack)
        assert len(model_config(stack).layers) == len(stack.layers)


@functools.cache
def value_of(text: str) -> Any:
    return yaml.safe_load(text)


def places(node: Any, path: tuple = ()) -> list[tuple]:
    """The path of every node below the root."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    found = []
    for key, value in items:
        found += [(*path, key), *places(value, (*path, key))]
    return found


def parent(root: Any, path: tuple) -> Any:
    for key in path[:-1]:
        root = root[key]
    return root


@st.composite
def mutated_values(draw: st.DrawFn) -> str:
    """A valid stack with a few of its values replaced, removed, moved or added."""
    root = copy.deepcopy(value_of(draw(st.sampled_from(SOURCES))))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(root)))
        holder = parent(root, path)
        match draw(st.sampled_from(["replace", "remove", "add", "copy"])):
            case "replace":
                holder[path[-1]] = draw(values)
            case "remove":
                del holder[path[-1]]
            case "add" if isinstance(holder, dict):
                holder[draw(st.sampled_from(NASTY))] = draw(values)
            case _:
                holder[path[-1]] = copy.deepcopy(parent(root, (*draw(st.sampled_from(places(root))), None)))
        if not places(root):
            break
    return yaml.safe_dump(root, sort_keys=False)


@st.composite
def mutated_text(draw: st.DrawFn) -> str:
    """The text of a valid stack with lines cut, doubled, swapped, indented or overwritten."""
    lines = draw(st.sampled_from(SOURCES)).split("\n")
    for _ in range(draw(st.integers(1, 4))):
        i = draw(st.integers(0, len(lines) - 1))
        match draw(st.sampled_from(["cut", "double", "indent", "overwrite", "insert"])):
            case "cut":
                lines[i] = lines[i][: draw(st.integers(0, 20))]
            case "double":
                lines.insert(i, lines[i])
            case "indent":
                lines[i] = " " * draw(st.integers(0, 9)) + lines[i].strip()
            case "overwrite":
                key, colon, _ = lines[i].partition(":")
                lines[i] = f"{key}{colon} {draw(st.sampled_from(NASTY))}"
            case _:
                at = draw(st.integers(0, len(lines[i])))
                lines[i] = lines[i][:at] + draw(st.sampled_from(NASTY)) + lines[i][at:]
    return "\n".join(lines)


@settings(max_examples=200)
@given(mutated_values())
def test_stacks_with_random_changes_to_values(text):
    check(text)


@settings(max_examples=300)
@given(mutated_text())
def test_stacks_with_random_changes_to_text(text):
    check(text)


@given(st.text(max_size=200) | st.lists(st.sampled_from([*NASTY, " ", "\n", ":", ","]), max_size=30).map("".join))
def test_random_text(text):
    check(text)


@given(st.binary(max_size=100))
def test_random_bytes_are_text_or_one_fault(data):
    try:
        text = read_text(data)
    except StackError as error:
        [fault] = error.faults
        text = str(fault)
    check(text)


def test_there_are_stacks_to_change():
    if not CORPUS.exists():
        pytest.skip(f"no corpus at {CORPUS.name}; the base alone is mutated")
    assert len(SOURCES) > 50
