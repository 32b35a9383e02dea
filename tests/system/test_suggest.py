"""Suggestions for mistyped names."""

from __future__ import annotations

import pytest

from retnet.system.suggest import LONGEST_NAME, choices, did_you_mean, did_you_mean_path, nearest

NAMES = ("retnet-tiny", "retnet-tiny-conv", "retnet-125m", "retnet-13b", "arch_beginner_llama")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("retnet-tiyn", "retnet-tiny"),
        ("retnet-tinyconv", "retnet-tiny-conv"),
        ("RetNet-Tiny", "retnet-tiny"),
        ("tiny", "retnet-tiny"),  # too short for its likeness, but a part of a name
        ("13b", "retnet-13b"),
        ("llama", "arch_beginner_llama"),
        ("arch-llama", "arch_beginner_llama"),
        ("gpt-4", None),
        ("", None),
        ("b", None),
        (None, None),
        (["retnet-tiny"], None),
    ],
)
def test_the_nearest_name_is_the_one_meant(given, meant):
    assert nearest(given, NAMES) == meant


def test_a_key_without_its_underscore_is_found():
    assert nearest("chunksize", ("chunk_size", "rope")) == "chunk_size"
    assert nearest("zzz", ("chunk_size", "rope")) is None


def test_of_names_that_differ_in_case_the_first_counts():
    assert nearest("BATCH", ["Batch", "batch"]) == "Batch"


def test_a_long_name_is_compared_by_its_beginning():
    name = "x" * LONGEST_NAME
    assert nearest(name + "y" * 10**6, [name]) == name


def test_a_message_lists_the_accepted_names_and_asks_for_the_nearest():
    assert choices("flaot32", ("float64", "float32")) == "accepted: float64, float32; did you mean 'float32'?"
    assert choices("int", ("float64", "float32")) == "accepted: float64, float32"
    assert did_you_mean("float32", ("float32",)) == ""  # a name that is accepted was not mistyped


def test_a_missing_path_is_compared_with_its_folder_and_with_other_names(tmp_path):
    (tmp_path / "demo").mkdir()
    assert did_you_mean_path(tmp_path / "dmeo") == f"; did you mean '{tmp_path / 'demo'}'?"
    assert did_you_mean_path(tmp_path / "other") == ""  # alike in its folder only
    assert did_you_mean_path(tmp_path / "nothing" / "demo") == ""
    assert did_you_mean_path("stdlb", ["stdlib"]) == "; did you mean 'stdlib'?"
    assert did_you_mean_path("", ["stdlib"]) == ""
