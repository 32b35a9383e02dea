"""Rows of a million tokens against short ones: the planted pairs, and the whole comparison at micro size."""

import json

import pytest
import torch
from long_rows_task import BLOCK, KEYS, VALUES, plant

from tests.paths import ROOT
from tests.torchrun import torchrun


@pytest.mark.parametrize("length", [3 * BLOCK, 1025, 5000])
def test_planted_pairs_are_asked_for_at_their_distance(length):
    text = torch.randint(100, (3, length), generator=torch.Generator().manual_seed(0))
    planted = plant(text, 100, torch.Generator().manual_seed(1))
    tokens, row, asked = planted.tokens, planted.row, planted.asked
    values, keys = tokens[row, asked], tokens[row, asked - 1]
    assert len(row) > 0
    assert torch.equal(tokens[row, asked - planted.distances], values)
    assert torch.equal(tokens[row, asked - planted.distances - 1], keys)
    assert ((keys >= 100) & (keys < 100 + KEYS)).all()
    assert ((values >= 100 + KEYS) & (values < 100 + KEYS + VALUES)).all()
    assert (tokens >= 100).sum() == 4 * len(row)  # pairs never collide
    between = tokens[row[0], asked[0] - planted.distances[0] + 1 : asked[0] - 1]
    assert not (between == keys[0]).any()
    if length > 2 * 1024:
        assert planted.distances.max() > length // 2
        assert (planted.distances == BLOCK).sum() > len(row) // 8


def test_rows_of_two_blocks_are_refused():
    with pytest.raises(ValueError, match="accepted: at least 192"):
        plant(torch.zeros(1, 3 * BLOCK - 1, dtype=torch.long), 100, torch.Generator())


@pytest.mark.slow
def test_the_comparison_runs_on_two_processes(tmp_path):
    done = torchrun(2, ROOT / "recipes" / "long_rows.py", "--tiny", "--out", tmp_path, "--commit", "test")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    measured = results["measured"]
    assert list(measured) == ["start", "long", "long, no exchange", "short"]
    behind = {name: found["positions"][-1] for name, found in measured.items()}
    assert behind["long"]["up_to"].endswith("behind a border")
    assert behind["long, no exchange"]["nats"] > behind["long"]["nats"] + 0.005
    assert any(row["across"] for row in measured["long"]["recall"])
    assert results["long"]["steps"] == results["short"]["steps"]
