"""The guide covers the schema: every section that errors point to, every key, every unsupported key."""

import re
from collections.abc import Iterator
from typing import get_args

import pytest

from retnet.stack import errors, load_stack, unsupported
from retnet.stack.mixers import MIXERS
from retnet.stack.schema import Spec
from retnet.stack.section import Section
from tests.paths import ROOT

GUIDE = ROOT / errors.GUIDE


@pytest.fixture(scope="module")
def guide() -> str:
    return GUIDE.read_text()


def sections(annotation=Spec, outer: tuple[type[Section], ...] = ()) -> Iterator[type[Section]]:
    """The sections in an annotation; a mixer that is made of mixers holds itself, and is not entered again."""
    if isinstance(annotation, type) and issubclass(annotation, Section) and annotation not in outer:
        yield annotation
        for inner in annotation.keys().values():
            yield from sections(inner, (*outer, annotation))
    for inner in get_args(annotation):
        yield from sections(inner, outer)


def test_every_section_that_errors_point_to_exists(guide):
    anchors = {heading.lower().replace(",", "").replace(" ", "-") for heading in re.findall(r"^## (.+)$", guide, re.M)}
    assert {*errors._SECTIONS.values(), "files", "let", "not-supported"} <= anchors
    assert {settings.GUIDE for settings in MIXERS.values()} <= anchors - {"mixer"}


def test_every_key_is_documented(guide):
    keys = {key for section in sections() for key in section.keys()}  # noqa: SIM118
    assert len(keys) > 60
    assert [key for key in sorted(keys) if not re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", guide)] == []


def test_every_unsupported_key_and_value_is_documented(guide):
    listed = guide.split("## Not supported")[1]
    names = {name for section in sections() for name in section.UNSUPPORTED} | set(unsupported.ENTRY_KINDS)
    values = {value for section in sections() for given in section.UNSUPPORTED_VALUES.values() for value in given}
    assert [name for name in sorted(names | values) if f"{name}`" not in listed] == []


def test_the_complete_file_is_the_example_and_is_valid(guide):
    (block,) = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)
    file = ROOT / "examples/hybrid.yml"
    assert block == file.read_text()
    assert load_stack(file)
