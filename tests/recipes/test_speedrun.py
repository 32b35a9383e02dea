"""The speedrun: its target is that of the measured Transformer, and a run ends at the first validation below it."""

import argparse
import math
import re
import statistics

import pytest
import speedrun
from quality_run import Session
from quality_train import Arm

from tests.paths import ROOT

ROWS = ROOT / "recipes" / "results" / "quality_125m.jsonl"


def test_the_target_is_the_mean_of_the_rows_of_the_transformer():
    losses = speedrun.rival_losses(ROWS)
    assert losses
    assert round(statistics.mean(losses), 4) == speedrun.TARGET, (
        "set TARGET to this mean, here and in recipes/README.md"
    )


def test_the_readme_names_the_target_and_the_entry():
    text = (ROOT / "recipes" / "README.md").read_text()
    assert f"{speedrun.TARGET} nats" in text
    assert "python recipes/speedrun.py" in text
    assert Arm.parse(speedrun.ENTRY, 1).steps > 1


def session(tmp_path) -> Session:
    shared = {"tiny": True, "eager": True, "steps": 20, "commit": "test", "deadline": None, "abandon": None, "done": []}
    return Session(argparse.Namespace(**shared, out=tmp_path), 0.0)


@pytest.mark.parametrize(("target", "reached"), [(math.inf, True), (0.0, False)])
def test_a_run_ends_at_the_first_validation_at_or_below_the_target_or_at_its_last_step(target, reached, tmp_path):
    row = speedrun.race(session(tmp_path), Arm.parse("retnet:muon:4e-3:0:10", 1), target)
    steps = [point["step"] for point in row["curve"]]
    assert row["reached"] is reached
    assert steps == ([8] if reached else [8, 9, 10])
    line = speedrun.leaderboard_row(row)
    assert re.match(r"\| \d" if reached else r"\| not reached in \d", line)
    assert line.count("|") == 8


def test_a_folder_that_is_not_there_is_an_error_that_names_what_writes_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["speedrun.py", "--data", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="2"):
        speedrun.main()
    assert "quality.py pack" in capsys.readouterr().err
