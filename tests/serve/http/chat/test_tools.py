from __future__ import annotations

import json
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retnet.data.tokenizer import ByteTokenizer
from retnet.serve.http.chat.tools import BEGIN, END, CallReader, Tool, ToolUse, tool_use
from retnet.serve.http.errors import ApiError
from retnet.serve.http.grammars.constraints import Constraints

CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Köln"}}\n</tool_call>'


def tool(name="weather", **parameters) -> Tool:
    schema = {"type": "object", "properties": parameters, "required": list(parameters), "additionalProperties": False}
    return Tool.model_validate({"type": "function", "function": {"name": name, "parameters": schema}})


def read(text: str, cuts=(), several: bool = True):
    """Text and calls of an answer that arrives in pieces."""
    reader = CallReader(several)
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(places)]
    said = "".join(reader.push(piece)[0] for piece in pieces) + reader.push("", last=True)[0]
    return said, [(call.name, json.loads(call.arguments)) for call in reader.calls]


ANSWERS = {
    "no call": ("Hello <b> there\n", ("Hello <b> there\n", [])),
    "a call": (CALL, ("", [("weather", {"town": "Köln"})])),
    "text before": ("I look.\n\n" + CALL + "\n", ("I look.", [("weather", {"town": "Köln"})])),
    "two calls": (CALL + "\n" + CALL, ("", [("weather", {"town": "Köln"})] * 2)),
    "text after": (CALL + "\nDone", ("\nDone", [("weather", {"town": "Köln"})])),
    "cut": (CALL[:40], (CALL[:40], [])),
    "cut in its beginning": ("x <tool_", ("x <tool_", [])),
    "not JSON": ("<tool_call>weather</tool_call> then " + CALL, (
        "<tool_call>weather</tool_call> then", [("weather", {"town": "Köln"})])),
    "no name": ('<tool_call>{"arguments": {}}</tool_call>', ('<tool_call>{"arguments": {}}</tool_call>', [])),
    "arguments are no object": (
        '<tool_call>{"name": "f", "arguments": 1}</tool_call>',
        ('<tool_call>{"name": "f", "arguments": 1}</tool_call>', []),
    ),
    "infinite": (
        '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>',
        ('<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>', []),
    ),
    "no arguments": ('<tool_call>{"name": "f"}</tool_call>', ("", [("f", {})])),
    "an end inside a string": (
        '<tool_call>{"name": "f", "arguments": {"x": "a</tool_call>\\"b"}}</tool_call>!',
        ("!", [("f", {"x": 'a</tool_call>"b'})]),
    ),
    "deep": (BEGIN + "[" * 100_000 + END, (BEGIN + "[" * 100_000 + END, [])),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_calls_and_text_of_an_answer(name):
    text, expected = ANSWERS[name]
    assert read(text) == expected


@given(st.sampled_from(sorted(set(ANSWERS) - {"deep"})), st.lists(st.integers(0, 200), max_size=6))
def test_pieces_change_nothing(name, cuts):
    text, expected = ANSWERS[name]
    assert read(text, cuts) == expected


PARTS = ["<tool_call>", "</tool_call>", "<", '"', "\\", "{", "}", " ", "a", CALL]


@given(st.lists(st.sampled_from(PARTS), max_size=12).map("".join), st.integers(0))
def test_any_answer_is_text_and_calls_whatever_its_pieces(text, cut):
    said, calls = read(text)
    assert read(text, [cut]) == (said, calls)
    if not calls:
        assert said == text


def test_text_is_held_only_where_a_call_may_begin():
    reader = CallReader()
    assert reader.push("Hi <b> <tool")[0] == "Hi <b>"
    assert reader.push("box> there")[0] == " <toolbox> there"


@pytest.mark.parametrize(
    "piece", ["</tool_call>", '<tool_call>"</tool_call>"', "<tool_call></tool_call>", "<tool_", " "]
)
def test_an_answer_that_repeats_marks_costs_little(piece):
    reader, begin = CallReader(), time.perf_counter()
    reader.push('<tool_call>"')
    for _ in range(10_000):
        reader.push(piece)
    assert "".join(reader.push("", last=True)[0]).endswith(piece.strip(" ") or " ")
    assert time.perf_counter() - begin < 5  # about 0.1 s


def test_one_call_alone_where_several_are_not_accepted():
    said, calls = read(CALL + CALL, several=False)
    assert len(calls) == 1
    assert said == CALL


def test_what_a_request_says_about_tools():
    tools = [tool("a"), tool("b")]
    assert not tool_use(None, None, None, "hermes").reads_calls
    assert not tool_use(tools, "none", None, "none").reads_calls
    assert tool_use(tools, None, None, "hermes") == ToolUse(tools, "auto", True)
    assert tool_use(tools, "required", False, "hermes").enforced
    named = tool_use(tools, {"type": "function", "function": {"name": "b"}}, None, "hermes")
    assert named.enforced
    assert named.choice == "b"


@pytest.mark.parametrize(
    ("tools", "choice", "form", "message"),
    [
        ([tool()], None, "none", "tools are not honoured"),
        (None, "required", "hermes", "without tools"),
        ([tool(), tool()], None, "hermes", "two tools are named 'weather'"),
        ([tool()], {"type": "function", "function": {"name": "x"}}, "hermes", "accepted: none, auto, required, or"),
        ([tool()], {"type": "function", "function": {"name": ["x"]}}, "hermes", "accepted: none, auto"),
        ([tool()], {"function": 1}, "hermes", "accepted: none, auto, required"),
    ],
)
def test_tools_that_do_not_fit_are_refused(tools, choice, form, message):
    with pytest.raises(ApiError, match=message) as refused:
        tool_use(tools, choice, None, form)
    assert refused.value.status == 400


@pytest.fixture(scope="module")
def constraints():
    made = Constraints(ByteTokenizer(), 257)
    yield made
    made.close()


def accepts(grammar, text: str) -> bool:
    """Whether a text is a whole output of a grammar."""
    matcher = grammar.matcher()
    return all(matcher.accept(byte) for byte in text.encode()) and (matcher.ended or matcher.accept(256))


def test_an_enforced_call_is_of_the_schema_of_a_tool(constraints):
    tools = [tool(town={"type": "string"}), tool("clock", zone={"type": "integer"})]
    grammar = constraints.compile_here(ToolUse(tools, "required").constraint())
    clock = '<tool_call>\n{"name": "clock", "arguments": {"zone": 3}}\n</tool_call>'
    for text in (CALL, clock, CALL + "\n" + clock):
        assert accepts(grammar, text), text
        assert read(text)[0] == ""
    for text in ("", "Hello", CALL[:-1], clock.replace("3", '"x"'), CALL.replace("weather", "other"), CALL + " "):
        assert not accepts(grammar, text), text


def test_a_named_call_is_that_of_the_tool_alone_and_once(constraints):
    tools = [tool(town={"type": "string"}), tool("clock", zone={"type": "integer"})]
    grammar = constraints.compile_here(ToolUse(tools, "weather", named=True).constraint())
    assert accepts(grammar, CALL)
    assert not accepts(grammar, CALL + "\n" + CALL)
    assert not accepts(grammar, '<tool_call>\n{"name": "clock", "arguments": {"zone": 3}}\n</tool_call>')


def test_a_call_without_a_schema_takes_any_object(constraints):
    plain = Tool.model_validate({"type": "function", "function": {"name": "f"}})
    grammar = constraints.compile_here(ToolUse([plain], "required", several=False).constraint())
    assert accepts(grammar, '<tool_call>\n{"name": "f", "arguments": {"a": [1]}}\n</tool_call>')
    assert not accepts(grammar, '<tool_call>\n{"name": "f", "arguments": 1}\n</tool_call>')


@pytest.mark.parametrize("schema", [{"$ref": "http://x"}, {"x-guidance": {}}, {"type": "nothing"}, {"pattern": "("}])
def test_a_schema_that_cannot_be_used_is_a_400_that_names_the_tool(constraints, schema):
    bad = Tool.model_validate({"type": "function", "function": {"name": "f", "parameters": schema}})
    with pytest.raises(ApiError, match="tools") as refused:
        constraints.compile_here(ToolUse([bad], "required").constraint())
    assert refused.value.status == 400
