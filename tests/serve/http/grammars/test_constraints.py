from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet.data.tokenizer import DOCUMENT_START, ByteTokenizer
from retnet.serve.http.errors import ApiError
from retnet.serve.http.grammars import constraints as module
from retnet.serve.http.grammars.constraints import Constraints, constraint_of
from tests.serve.http.grammars.tools import allowed_by, at_random, constraint, draw, fits

VOCAB = 260  # padded beyond the 257 of bytes
DEEP_CHAIN = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4000)) + 'r4000: "a"\n'
BLOW_UP = "start: T\nT: " + " & ".join(f"/(?s:.)*a(?s:.){{{i}}}/" for i in range(100))


@pytest.fixture(scope="module")
def constraints():
    made = Constraints(ByteTokenizer(), VOCAB)
    yield made
    made.close()


def text_of(tokens: list[int]) -> str:
    return ByteTokenizer().decode_bytes(tokens).decode()


def refusal(constraints: Constraints, **structured: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        constraints.compile_here(constraint(**structured))
    assert caught.value.status == 400
    assert len(caught.value.message) < 600
    return caught.value


# Fields of a request


def test_text_and_nothing_ask_for_no_constraint():
    assert constraint_of(None, None) is None
    assert constraint_of({"type": "text"}, {"json": None, "json_object": False}) is None


def test_both_spellings_of_a_schema_are_the_same_constraint():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    described = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    assert constraint_of(described, None) == constraint(json=schema) == constraint(json=json.dumps(schema))
    assert constraint_of({"type": "json_object"}, None) == constraint(json_object=True)


@pytest.mark.parametrize(
    ("response_format", "structured", "param"),
    [
        ({"type": "json_object"}, {"regex": "a"}, "structured_outputs"),
        ({"type": "xml"}, None, "response_format.type"),
        ({"type": ["json_object"]}, None, "response_format.type"),
        ({}, None, "response_format.type"),
        ({"type": "json_object", "json_schema": {}}, None, "response_format"),
        ({"type": "json_schema"}, None, "response_format.json_schema.name"),
        ({"type": "json_schema", "json_schema": []}, None, "response_format.json_schema"),
        (
            {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
            None,
            "response_format.json_schema.name",
        ),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, None, "response_format.json_schema.schema"),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "strict": 1}},
            None,
            "response_format.json_schema.strict",
        ),
        ({"type": "json_schema", "json_schema": {"name": "a", "x": {}}}, None, "response_format.json_schema"),
        (None, {"regex": "a", "choice": ["a"]}, "structured_outputs"),
        (None, {"structural_tag": "a"}, "structured_outputs"),
        (None, {"regex": 1}, "structured_outputs.regex"),
        (None, {"regex": ""}, "structured_outputs.regex"),
        (None, {"regex": "a" * 20_000}, "structured_outputs.regex"),
        (None, {"grammar": "a" * 70_000}, "structured_outputs.grammar"),
        (None, {"choice": []}, "structured_outputs.choice"),
        (None, {"choice": ["a", 1]}, "structured_outputs.choice"),
        (None, {"choice": ["a"] * 10_001}, "structured_outputs.choice"),
        (None, {"choice": "ab"}, "structured_outputs.choice"),
        (None, {"json": True}, "structured_outputs.json"),
        (None, {"json": "{"}, "structured_outputs.json"),
        (None, {"json": "[" * 100_000}, "structured_outputs.json"),
        (None, {"json": {"enum": ["a" * 200_000]}}, "structured_outputs.json"),
        (None, {"json": {"const": float("nan")}}, "structured_outputs.json"),
        (None, {"json": {"const": "\ud800"}}, "structured_outputs.json"),
        (None, {"json": {"x-guidance": {"whitespace_flexible": True}}}, "structured_outputs.json"),
        (None, {"json_object": "yes"}, "structured_outputs.json_object"),
    ],
)
def test_malformed_fields_are_refused_by_name(response_format, structured, param):
    with pytest.raises(ApiError) as caught:
        constraint_of(response_format, structured)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert len(caught.value.message) < 400


def test_a_schema_that_refers_to_another_document_is_refused():
    for reference in ("http://example.com/a.json", "file:///etc/passwd", "other.json#/a"):
        with pytest.raises(ApiError, match="no other document is fetched"):
            constraint(json={"properties": {"a": {"items": [{"$ref": reference}]}}})


def test_a_property_named_ref_is_not_taken_for_a_reference():
    assert constraint(json={"properties": {"$ref": {"type": "string"}}}).kind == "json"


def test_a_deep_schema_is_refused():
    schema: dict[str, Any] = {}
    for _ in range(module.MAX_DEPTH):
        schema = {"items": schema}
    with pytest.raises(ApiError, match="nested more than 64 levels"):
        constraint(json=schema)
    assert constraint(json=schema["items"]).kind == "json"


# Outputs


def test_a_json_object_is_one(constraints):
    for seed in range(10):
        tokens = draw(constraints, constraint(json_object=True), VOCAB, at_random(seed), most=1000)
        if len(tokens) < 1000:
            assert isinstance(json.loads(text_of(tokens)), dict)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "next": {"anyOf": [{"$ref": "#/$defs/point"}, {"type": "null"}]},
    },
    "required": ["name", "age", "tags", "next"],
    "additionalProperties": False,
    "$defs": {"point": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]}},
}


def test_outputs_of_a_schema_have_its_form(constraints):
    finished = 0
    for seed in range(30):
        tokens = draw(constraints, constraint(json=SCHEMA), VOCAB, at_random(seed), most=600)
        if tokens[-1] != ord("}") or len(tokens) == 600:
            continue
        finished += 1
        value = json.loads(text_of(tokens))
        assert set(value) == {"name", "age", "tags", "next"}
        assert len(value["name"]) <= 5
        assert 0 <= value["age"] <= 150
        assert len(value["tags"]) <= 3
        assert set(value["tags"]) <= {"a", "b"}
        assert value["next"] is None or isinstance(value["next"]["x"], bool)
    assert finished > 10


SCALARS = st.sampled_from([
    {"type": "integer", "minimum": -3, "maximum": 40},
    {"type": "boolean"},
    {"type": "null"},
    {"type": "string", "maxLength": 3},
    {"enum": ["x", 1, None]},
    {"const": {"a": [1]}},
    {"type": "string", "pattern": "^[a-c]+x?$", "maxLength": 4},
])  # fmt: skip
SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.builds(lambda items: {"type": "array", "items": items, "maxItems": 2}, inner),
        st.builds(lambda some: {"anyOf": some}, st.lists(inner, min_size=1, max_size=2)),
        st.dictionaries(st.sampled_from(["a", 'b"', "ü"]), inner, max_size=2).map(
            lambda properties: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties),
                "additionalProperties": False,
            }
        ),
    ),
    max_leaves=4,
)


def valid(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is of a schema of `SCHEMAS`."""
    if "anyOf" in schema:
        return any(valid(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return any(type(value) is type(one) and value == one for one in schema["enum"])
    if "const" in schema:
        return value == schema["const"]
    kind = schema["type"]
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "string":
        fits = "pattern" not in schema or re.fullmatch("[a-c]+x?", value)
        return isinstance(value, str) and len(value) <= schema["maxLength"] and bool(fits)
    if kind == "array":
        return isinstance(value, list) and len(value) <= 2 and all(valid(one, schema["items"]) for one in value)
    if kind == "object":
        same = isinstance(value, dict) and set(value) == set(schema["properties"])
        return same and all(valid(value[name], inner) for name, inner in schema["properties"].items())
    return value is None if kind == "null" else isinstance(value, bool)


@settings(max_examples=40, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 1000))
def test_outputs_of_small_schemas_are_valid(constraints, schema, seed):
    tokens = draw(constraints, constraint(json=schema), VOCAB, at_random(seed), most=1000)
    if len(tokens) < 1000:
        assert valid(json.loads(text_of(tokens)), schema)


def test_a_choice_is_one_of_the_strings_exactly(constraints):
    choices = ["a", "ab", "", "a/b\\c", "\n\t ", "φ|.*", '"', "0"]
    wanted = constraint(choice=choices)
    assert {text_of(draw(constraints, wanted, VOCAB, at_random(seed))) for seed in range(150)} == set(choices)
    for text in choices:
        assert fits(constraints, wanted, text.encode(), DOCUMENT_START)
    for text in ("b", "abc", "a/b", "aa", " ", "φ|", "φ|x"):
        assert not fits(constraints, wanted, text.encode(), DOCUMENT_START)


@settings(max_examples=25, deadline=None)
@given(choices=st.lists(st.text(max_size=4), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_any_strings_are_choices(constraints, choices, seed):
    tokens = draw(constraints, constraint(choice=choices), VOCAB, at_random(seed))
    assert text_of(tokens) in choices


@pytest.mark.parametrize(
    "pattern", ["a{2,4}", "[a-c]+(x|yz)?", r"[0-9]{1,3}(\.[0-9]+)?", "a/b", "^[^\n]{1,3}$", "(?i)yes|no"]
)
def test_outputs_of_a_regular_expression_match_it_whole(constraints, pattern):
    for seed in range(15):
        tokens = draw(constraints, constraint(regex=pattern), VOCAB, at_random(seed), most=60)
        if tokens[-1] == DOCUMENT_START or len(tokens) < 60:
            assert re.fullmatch(pattern, text_of(tokens)), text_of(tokens)


def test_a_grammar_in_lark(constraints):
    wanted = constraint(grammar='start: item ("," item)*\nitem: /[0-9]+/ | "(" start ")"\n')
    for text in (b"1", b"12,(3,4),5", b"((1))"):
        assert fits(constraints, wanted, text, DOCUMENT_START)
    for text in (b"", b"1,", b"(1", b"a"):
        assert not fits(constraints, wanted, text, DOCUMENT_START)


# White space


def test_white_space_of_json_is_bounded(constraints):
    """A model that prefers white space to everything else gets to the end of an object all the same."""
    white = (32, 10, 9, 13)

    def prefers_white_space(allowed: list[int]) -> int:
        return next((token for token in white if token in allowed), min(allowed))

    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    closed = schema | {"additionalProperties": False}
    text = text_of(draw(constraints, constraint(json=closed), VOCAB, prefers_white_space))
    assert json.loads(text) == {"a": False}
    assert len(text) < 30

    def prefers_lines(allowed: list[int]) -> int:
        return next((token for token in (10, 9, 32) if token in allowed), min(allowed))

    text = text_of(draw(constraints, constraint(json=closed), VOCAB, prefers_lines, most=1000))
    assert json.loads(text) == {"a": False}


def test_indented_and_compact_json_both_fit(constraints):
    wanted = constraint(json_object=True)
    value = {"a": [1, {"b": None}], "c": {"d": "e"}}
    for text in (json.dumps(value), json.dumps(value, indent=2), json.dumps(value, separators=(",", ":"))):
        assert fits(constraints, wanted, text.encode(), DOCUMENT_START)


# Refusals


@pytest.mark.parametrize(
    ("structured", "message"),
    [
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": r"a(?=b)"}, "look-ahead"),
        ({"regex": "((a{100}){100}){100}"}, "mask of one token|takes longer"),
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"not": {}}}, "not"),
        ({"json": {"type": "string", "format": "zip"}}, "zip"),
        ({"json": {"type": "thing"}}, "thing"),
        ({"json": {"enum": []}}, "Unsatisfiable"),
        ({"json": {"$ref": "#"}}, "no text fits it"),
        ({"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}}, "no text"),
        ({"json": {"$ref": "#/nowhere"}}, "nowhere"),
        ({"json": {"allOf": [{"anyOf": [{"minimum": i}, {"maximum": i}]} for i in range(40)]}}, "large|cannot be used"),
        ({"json": {"type": "object", "properties": {f"p{i}": {} for i in range(1000)}}}, "row has"),
        ({"grammar": "start: x"}, "unknown name"),
        ({"grammar": "nothing"}, "grammar cannot be used"),
        ({"grammar": "start: start"}, "no text fits it"),
        ({"grammar": 'root ::= "a"'}, "grammar cannot be used"),
        ({"grammar": 'start: <|document|> "a"'}, "special tokens"),
        ({"grammar": "start: <[257]>"}, "no text of this tokenizer"),
        ({"grammar": DEEP_CHAIN}, "too deeply|too much memory"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_the_reason(constraints, structured, message):
    error = refusal(constraints, **structured)
    assert re.search(message, error.message), error.message
    assert error.param in {f"structured_outputs.{name}" for name in structured}


def test_a_grammar_that_takes_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(module, "COMPILE_SECONDS", 0.3)
    made = Constraints(ByteTokenizer(), VOCAB)
    try:
        assert "takes longer than 0.3 s" in refusal(made, grammar=BLOW_UP).message
        assert text_of(draw(made, constraint(choice=["a"]), VOCAB, at_random(0))) == "a"
    finally:
        made.close()


def test_special_tokens_are_never_allowed_but_the_end(constraints):
    """A grammar in Lark can name tokens by number."""
    matcher = constraints.compile_here(constraint(grammar='start: <[0-259]> "a"')).matcher()
    assert allowed_by(matcher, VOCAB) == list(range(255))  # 255 is part of no text
    matcher = constraints.compile_here(constraint(grammar='start: (<[0-259]> "a")?')).matcher()
    assert allowed_by(matcher, VOCAB) == [*range(255), DOCUMENT_START]
    assert matcher.accept(DOCUMENT_START)
    assert matcher.ended


KEYWORDS = [
    "type", "properties", "items", "anyOf", "allOf", "oneOf", "enum", "const", "$ref", "$defs", "required",
    "additionalProperties", "pattern", "format", "not", "$id", "patternProperties", "minLength", "maxLength",
    "minimum", "maximum", "multipleOf", "prefixItems", "minItems", "maxItems", "minProperties",
]  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(
        ["string", "integer", "number", "object", "array", "null", "#", "#/$defs/a", "uuid", "a+", "(", "^a$"]
    ),
    st.sampled_from([None, True, False, 0, 1, -1, 3, 0.1, 1e300, 10**20, ["a", "a"], ["string", "null"]]),
    st.text(max_size=3),
)
ANYTHING = st.recursive(
    VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYWORDS, "a"]), inner, max_size=4),
    max_leaves=10,
)
PIECES = st.sampled_from(
    [
        "start: ",
        "a: ",
        "B: ",
        '"x"',
        "/[a-z]+/",
        "a",
        "B",
        "(",
        ")",
        "|",
        "?",
        "*",
        "{2}",
        "\n",
        "%ignore ",
        "<[65]>",
        "~",
        '"',
    ]
)
WILD = st.one_of(
    st.builds(lambda schema: {"json": schema}, st.dictionaries(st.sampled_from(KEYWORDS), ANYTHING, max_size=5)),
    st.builds(lambda text: {"regex": text}, st.text("ab()[]{}*+?|.^$\\d1,-:/& \nü", min_size=1, max_size=14)),
    st.builds(lambda pieces: {"grammar": "start: " + "".join(pieces)}, st.lists(PIECES, max_size=14)),
)


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@given(structured=WILD, seed=st.integers(0, 99))
def test_whatever_is_given_is_followed_or_refused(constraints, structured, seed):
    try:
        tokens = draw(constraints, constraint(**structured), VOCAB, at_random(seed), most=60)
    except ApiError as refused:
        if refused.status != 400:
            raise
        return
    if len(tokens) == 60:
        return
    text = text_of(tokens)
    if "json" in structured:
        json.loads(text)
    elif "regex" in structured:
        try:
            pattern = re.compile(structured["regex"])
        except re.error:  # the syntax is not Python's
            return
        assert pattern.fullmatch(text)


# Compilation


def test_a_grammar_is_compiled_once_and_the_oldest_are_dropped(constraints, monkeypatch):
    first = constraints.compile_here(constraint(regex="kept"))
    assert constraints.compile_here(constraint(regex="kept")) is first
    monkeypatch.setattr(module, "CACHED", 2)
    for i in range(2):
        constraints.compile_here(constraint(regex=f"other{i}"))
    assert constraints.compile_here(constraint(regex="kept")) is not first


def test_compilation_does_not_hold_up_the_event_loop_and_too_many_are_shed(monkeypatch):
    monkeypatch.setattr(module, "COMPILE_SECONDS", 0.3)
    monkeypatch.setattr(module, "MAX_WAITING", 3)
    made = Constraints(ByteTokenizer(), VOCAB)

    async def run() -> tuple[list[Any], int]:
        tasks = [asyncio.create_task(made.compile(constraint(grammar=BLOW_UP + f" & /{i}/"))) for i in range(5)]
        ticks = 0
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0.01)
            ticks += 1
        return await asyncio.gather(*tasks, return_exceptions=True), ticks

    try:
        results, ticks = asyncio.run(run())
    finally:
        made.close()
    assert sorted(error.status for error in results) == [400, 400, 400, 429, 429]
    assert ticks > 3  # a loop that compiles itself gets to one or two
