"""`let` and `${...}`: their values, and what they refuse."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retnet.stack.expressions import ExpressionError, evaluate, is_expression

from .specs import changed, faults, only, stack

NAMES = {"d": 64, "h": 4, "x": 0.5}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("${64}", 64),
        ("  ${ 2 + 3 * 4 }  ", 14),
        ("${(2 + 3) * 4}", 20),
        ("${let.d * let.h}", 256),
        ("${let.d / 2}", 32),
        ("${7 // 2}", 3),
        ("${-7 // 2}", -4),
        ("${-let.x}", -0.5),
        ("${+1}", 1),
        ("${9/10}", 0.9),
        ("${1e3}", 1000),
        ("${0x10}", 16),
        ("${1_000}", 1000),
    ],
)
def test_arithmetic_follows_python(expression, value):
    result = evaluate(expression, NAMES)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    "expression",
    [
        "${}", "${ }", "${2 ** 3}", "${7 % 2}", "${1 @ 2}", "${1 << 3}", "${1 | 2}", "${1 < 2}", "${~1}", "${not 1}",
        "${1 and 2}", "${1 if 1 else 2}", "${max(1, 2)}", "${lambda: 1}", "${(x := 1)}", "${__import__('os')}",
        "${...}", "${d}", "${let}", "${let.d.e}", "${other.d}", "${let['d']}", "${let.missing}", "${'64'}", "${f'{1}'}",
        "${True}", "${None}", "${1j}", "${[1]}", "${1 +}", "${1 2}", "${1; 2}", "${\0}", "${'\\d'}",
        "${1 / 0}", "${1 // 0}", "${1.0 // 0.0}", "${1e400}", "${1e308 * 10}", "${1e308 - -1e308}",
        "${9223372036854775808}", "${4611686018427387904 * 2 * 2}", "${" + "9" * 150 + "}", "${1" + " + 1" * 100 + "}",
    ],
)  # fmt: skip
def test_other_syntax_is_refused_with_a_fix(expression):
    with pytest.raises(ExpressionError) as caught:
        evaluate(expression, NAMES)
    assert caught.value.fix


@given(st.text(alphabet="0123456789.+-*/() letdhx_e", max_size=40))
def test_any_text_gives_a_finite_number_or_an_expression_error(body):
    try:
        value = evaluate("${" + body + "}", NAMES)
    except ExpressionError:
        return
    assert isinstance(value, int | float)
    assert math.isfinite(value)


def test_an_expression_spans_the_whole_text():
    assert is_expression(" ${1} ")
    assert not any(is_expression(value) for value in ("x${1}", "${1}x", "$ {1}", "{1}", 1, None, ["${1}"]))


def test_whole_results_are_integers_and_others_floats():
    spec = stack(
        ("d_model: 64", "d_model: ${let.w * 128}"), more='let: {w: 0.5}\ntraining_hints: {betas: ["${9/10}", 0.95]}\n'
    ).spec
    assert spec.model.d_model == 64
    assert spec.training_hints.betas == [0.9, 0.95]


def test_a_float_too_large_to_be_exact_stays_a_float():
    assert isinstance(evaluate("${4503599627370496.0 * 1}", {}), int)
    assert isinstance(evaluate("${9007199254740992.0 * 1}", {}), float)


def test_an_unknown_name_is_reported_with_the_nearest_one():
    fault = only(changed(("d_model: 64", "d_model: ${let.widht}"), more="let: {width: 64}\n"))
    assert (fault.dotted, fault.mark.line, fault.mark.column) == ("model.d_model", 4, 12)
    assert "let.width?" in fault.fix
    assert fault.see == "docs/reference/stack.md#let"


def test_a_faulty_expression_hides_no_other_fault_and_is_reported_once():
    text = changed(
        ("d_model: 64", "d_model: ${1/0}"), ("vocab_size: 257", "vocab_size: no"), ("n_heads: 4", "n_heads: 0")
    )
    assert [fault.dotted for fault in faults(text)] == ["model.d_model", "model.vocab_size", "model.n_heads"]


@pytest.mark.parametrize(
    ("block", "path"),
    [
        ("let: 3", "let"), ("let: null", "let"), ("let: [1]", "let"), ("let: {1: 2}", "let"), ("let: {a-b: 2}", "let"),
        ("let: {a: 1, a: 2}", "let"), ("let: {a: b}", "let.a"), ("let: {a: true}", "let.a"), ("let: {a: [1]}", "let.a"),
        ("let: {a: '${1}'}", "let.a"), ("let: {a: .nan}", "let.a"),
    ],
)  # fmt: skip
def test_let_must_be_a_mapping_of_names_to_numbers(block, path):
    assert only(changed(more=block + "\n")).dotted == path


def test_text_around_an_expression_is_refused_for_numbers_and_kept_as_text():
    assert "from start to end" in only(changed(("d_model: 64", "d_model: x${let.d}"))).fix
    assert stack(("name: base", "name: x${let.d}")).spec.model.name == "x${let.d}"


def test_an_expression_is_refused_where_text_is_required():
    assert only(changed(("name: base", "name: ${1 + 1}"))).dotted == "model.name"
