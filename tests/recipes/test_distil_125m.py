"""The recipe of distillation: names of arms, and a tiny run of every kind."""

import json

import distil_125m
import pytest


def test_names_of_arms_have_a_rate_and_may_have_those_of_aligning():
    arm = distil_125m.Trial.parse("chosen:muon:1e-3:4e-3:0.25")
    assert (arm.kind, arm.optimizer, arm.rate, arm.align_rate, arm.align_share) == ("chosen", "muon", 1e-3, 4e-3, 0.25)
    assert arm.cross_entropy == distil_125m.CROSS_ENTROPY
    assert distil_125m.Trial.parse("distil:adamw:1e-3:2e-3:0.4:0").cross_entropy == 0
    assert distil_125m.Trial.parse("distil:adamw:1e-3").align_rate == 2e-3
    assert {distil_125m.Trial.parse(name).kind for name in distil_125m.DEFAULT_ARMS} == set(distil_125m.KINDS)


@pytest.mark.parametrize(
    "name",
    ["distil", "other:adamw:1", "distil:sgd:1", "distil:adamw:0", "distil:adamw:1:1:1", "distil:adamw:1:1:0.5:1"],
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="accepted: kind:optimizer:rate"):
        distil_125m.Trial.parse(name)


@pytest.mark.slow
def test_a_tiny_run_measures_the_teacher_and_every_arm_once(tmp_path, capsys):
    words = ["--tiny", "--teacher-steps", "20", "--commit", "test", "--out", str(tmp_path)]
    distil_125m.main(words)
    rows = {row["name"]: row for row in (json.loads(file.read_text()) for file in tmp_path.glob("*.json"))}
    assert rows.keys() == {"teacher:20", *distil_125m.DEFAULT_ARMS}
    assert {row["tokens"] for name, row in rows.items() if name != "teacher:20"} == {rows["teacher:20"]["tokens"] // 10}
    copied, distilled = rows["copied:adamw:1e-3"], rows["distil:adamw:1e-3:2e-3"]
    assert copied["start_errors"] == distilled["start_errors"]
    assert max(distilled["start_errors"]) < 1
    assert len(rows["chosen:adamw:1e-3:2e-3"]["chosen"]["kept"]) == 1
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    distil_125m.main(words)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before
    assert capsys.readouterr().out.count("| `copied:adamw") == 2
