"""Findings as they cross from process to process."""

import pytest

from retnet.cli.diagnosis.finding import Finding, reason


def test_a_finding_is_read_back_as_it_was():
    finding = Finding("GPU", "slow", "none", "buy one")
    assert Finding.of(finding.as_dict()) == finding


@pytest.mark.parametrize("values", [None, [], {}, {"name": "a", "status": "fine", "text": "", "advice": ""},
                                    {"name": 1, "status": "ok", "text": "", "advice": ""}])  # fmt: skip
def test_anything_else_is_refused(values):
    with pytest.raises(ValueError, match="not a finding"):
        Finding.of(values)


def test_an_error_takes_one_line():
    assert reason(ValueError("a\nb")) == "ValueError: a b"
    assert reason(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert len(reason(ValueError("x" * 9999))) < 500
