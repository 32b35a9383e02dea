"""Reading YAML: places of values, pitfalls of YAML 1.1, limits."""

import pytest

from retnet.stack import StackError, load_stack, parse_stack
from retnet.stack.document import MAX_BYTES, MAX_DEPTH, parse
from retnet.stack.errors import Mark

from .specs import BASE, changed, faults, only, stack


def fatal(text: str):
    with pytest.raises(StackError) as caught:
        parse(text)
    [fault] = caught.value.faults
    return fault


def test_every_key_and_value_has_its_line_and_column():
    document = parse("a: 1\nb:\n  - x\n  - {c: 'd'}\n")
    assert document.root == {"a": 1, "b": ["x", {"c": "d"}]}
    assert document.mark(("a",)) == Mark(1, 4)
    assert document.mark(("a",), key=True) == Mark(1, 1)
    assert document.mark(("b", 0)) == Mark(3, 5)
    assert document.mark(("b", 1, "c")) == Mark(4, 9)
    assert document.mark(("b", 1, "c"), key=True) == Mark(4, 6)


@pytest.mark.parametrize(
    ("line", "path", "place"),
    [
        ("  d_model: 0", "model.d_model", (4, 12)),
        ("  d_model: 64\n  widht: 1", "model", (5, 3)),
        ("  d_model: 64\n  d_model: 64", "model", (5, 3)),
        ("  d_model: 64\n  7: 1", "model", (5, 3)),
        ("  d_model: 64\n  on: 1", "model", (5, 3)),
        ("  d_model: 64\n  [a]: 1", "model", (5, 3)),
        ("  d_model: 64\n  ${1}: 1", "model", (5, 3)),
        ("", "model", (2, 1)),
    ],
)
def test_a_fault_points_to_its_value_or_its_key(line, path, place):
    fault = only(changed(("  d_model: 64", line)))
    assert fault.dotted == path
    assert (fault.mark.line, fault.mark.column) == place


@pytest.mark.parametrize(
    ("written", "fix"),
    [
        ("3e-4", "3.0e-4"),
        ("1e6", "1.0e+6"),
        ("'0.1'", "0.1"),
        ("1.5E6", "1.5e+6"),
    ],
)
def test_a_float_that_yaml_reads_as_text_is_refused_with_its_correct_spelling(written, fix):
    fault = only(changed(more=f"training_hints: {{lr_peak: {written}}}\n"))
    assert fault.dotted == "training_hints.lr_peak"
    assert fault.fix.startswith(f"write {fix} ")
    assert isinstance(stack(more=f"training_hints: {{lr_peak: {fix}}}\n").spec.training_hints.lr_peak, float)


@pytest.mark.parametrize("written", [".nan", ".inf", "-.inf", "1" + "0" * 400 + ".0"])
def test_a_number_that_is_not_finite_is_refused(written):
    assert only(changed(more=f"training_hints: {{lr_peak: {written}}}\n")).dotted == "training_hints.lr_peak"


@pytest.mark.parametrize(
    "written",
    ["9223372036854775808", "9" * 5000, "2001-01-01", "2001-99-99", "=", "!!binary aGk=", "!!int x", "!!float x",
     "!!bool x", "!!int ''", "!mine 3", "!!python/name:os.system x", "!!set {a}", "!!omap [a: 1]"],
)  # fmt: skip
def test_other_scalars_and_tags_are_refused_at_their_place(written):
    fault = only(changed(("d_model: 64", f"d_model: {written}")))
    assert (fault.dotted, fault.mark.line) == ("model.d_model", 4)


def test_yaml_1_1_reads_words_as_booleans():
    assert stack(more="training_hints: {checkpointing: yes}\n").spec.training_hints.checkpointing is True
    assert "without quotes" in only(changed(more="training_hints: {checkpointing: 'yes'}\n")).fix


def test_merge_keys_add_keys_and_do_not_override():
    text = changed(
        ("layer_templates:\n", "layer_templates:\n  base: &base\n    mixer: {type: hyena}\n    ffn: &ffn {type: mlp}\n"
         "  more:\n    <<: *base\n    mixer: {type: mamba}\n  again: {ffn: *ffn, <<: [*base]}\n"),
    )  # fmt: skip
    templates = parse_stack(text).spec.layer_templates
    assert templates["more"].mixer.type == "mamba"
    assert templates["more"].ffn == templates["again"].ffn == templates["base"].ffn
    assert templates["again"].mixer.type == "hyena"


def test_merging_anything_but_a_mapping_is_refused():
    assert only(changed(("  name: base", "  name: base\n  <<: 3"))).dotted == "model"


def test_an_alias_inside_its_anchor_is_refused():
    text = changed(("    ffn: {type: mlp}", "    ffn: &loop {type: mlp, moe: *loop}"))
    assert only(text).dotted == "layer_templates.a.ffn.moe"


@pytest.mark.parametrize(
    ("text", "where", "word"),
    [
        ("", (1, 1), "null"),
        ("# nothing\n", (1, 1), "null"),
        ("- 1\n", (1, 1), "list"),
        ("\n just text", (2, 2), "just text"),
        ("a: 1\n b: 2\n", (2, 3), "mapping values"),
        ("a: [1\nb: 2\n", (2, 2), "flow sequence"),
        ("a: *missing\n", (1, 4), "alias"),
        ("a: 1\n---\nb: 2\n", (2, 1), "document"),
        ("a: 1\n\tb: 2\n", (2, 1), "token"),
        ("a: '\n", (2, 1), "quoted"),
        ("a: \x01\n", (1, 4), "character"),
        ("a: 1\nb: \x7f\n", (2, 4), "character"),
        ("%YAML 2.0\n---\na: 1\n", (1, 1), "version"),
    ],
)
def test_a_file_that_is_not_one_mapping_has_one_fault_at_its_root(text, where, word):
    fault = fatal(text)
    assert fault.dotted == "root"
    assert (fault.mark.line, fault.mark.column) == where
    assert word in fault.what
    assert len(str(fault).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: " + "[" * (MAX_DEPTH + 1), "levels"),
        ("- " * 100_000, "levels"),
        ("? " * 1000, "levels"),
        ("a: [" + "1, " * 30_000 + "]", "values"),
        ("a: &x 1\nb: [" + "*x, " * 300 + "]", "aliases"),
        ("a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
            f"{y}: &{y} [*{x}, *{x}, *{x}, *{x}, *{x}, *{x}, *{x}, *{x}]\n" for x, y in zip("abcdefgh", "bcdefghi")
        ), "aliases are written out"),
    ],
)  # fmt: skip
def test_files_beyond_the_limits_are_refused(text, word):
    assert word in fatal(text).what


def test_a_file_that_cannot_be_read_is_a_fault(tmp_path):
    large, latin = tmp_path / "large.yml", tmp_path / "latin.yml"
    large.write_bytes(b"#" * (MAX_BYTES + 1))
    latin.write_bytes(b"a: 1\nb: \xe4\n")
    for path, word in (
        (tmp_path / "absent.yml", "No such file"),
        (tmp_path, "directory"),
        ("\0", "null"),
        (large, "bytes"),
    ):
        with pytest.raises(StackError, match=word):
            load_stack(path)
    with pytest.raises(StackError) as caught:
        load_stack(latin)
    assert caught.value.faults[0].mark == Mark(2, 4)


def test_a_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "bom.yml"
    path.write_text(BASE, encoding="utf-8-sig")
    assert load_stack(path).spec == parse_stack(BASE).spec
    assert faults(BASE) == []


def test_a_text_has_the_limit_of_a_file():
    """A saved model holds its stack as text, which no file's size limits."""
    with pytest.raises(StackError, match=f"has {MAX_BYTES + 1} bytes, more than the {MAX_BYTES}"):
        parse_stack("#" * (MAX_BYTES + 1))
    with pytest.raises(StackError, match="bytes, more than"):
        parse_stack("\N{SNOWMAN}" * (MAX_BYTES // 3 + 1))
    assert parse_stack(BASE + "#" * (MAX_BYTES - len(BASE))).layers
