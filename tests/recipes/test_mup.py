"""The recipe of muP: a run at micro size, its tables, and what it calls the best rate."""

import math
from dataclasses import replace

import mup
import pytest
import torch
from quality_data import Corpus, Stream


def corpus() -> Corpus:
    tokens = torch.arange(2000, dtype=torch.int32) % 7
    stream = Stream(tokens, (2000,), (2000,))
    return Corpus(61, stream, stream, stream, stream)


@pytest.mark.slow
def test_a_micro_run_gives_rows_tables_and_a_plot(tmp_path):
    small = {"widths": (8, 16), "head_dim": 8, "length": 8, "batch": 2, "steps": 2, "valid_rows": 4}
    setting = replace(mup.SETTINGS["quick"], rates=(2**-8, 2**-7), **small)
    rows = [row for found in mup.measure(setting, corpus(), torch.device("cpu"), graphs=False) for row in found]
    losses = {kind: {width: mup.losses_of(rows, kind, width) for width in (8, 16)} for kind in mup.KINDS}
    assert losses["muP"][8] == losses["ordinary"][8]  # trained once
    assert losses["muP"][16] != losses["ordinary"][16]
    assert all(set(found) == {2**-8, 2**-7} for kind in losses.values() for found in kind.values())
    text = mup.tables(rows)
    assert "| power of the width | embedding | layer 1 | layer 2 | logits |" in text
    assert text.count("| muP |") == 3
    mup.picture(rows, tmp_path / "mup.png", "")
    assert (tmp_path / "mup.png").stat().st_size > 10_000


def test_the_configurations_differ_by_muP_alone():
    setting = mup.SETTINGS["full"]
    ordinary, rules = (mup.config_of(setting, kind, 768, 257) for kind in mup.KINDS)
    assert (rules.mup_base_width, rules.logit_scale) == (128, 1 / 6)
    assert replace(rules, mup_base_width=None, logit_scale=1.0, name=ordinary.name) == ordinary
    assert ordinary.layers[0].mixer.head_key_dim == 64


@pytest.mark.parametrize(
    ("losses", "expected"),
    [((3.0, 2.0, 2.5), "2^-4"), ((2.0, 3.0, 4.0), "at most 2^-5"), ((math.inf, 3.0, 2.0), "at least 2^-3")],
)
def test_a_best_rate_at_an_end_of_the_grid_is_called_so(losses, expected):
    assert mup.best_rate(dict(zip((2**-5, 2**-4, 2**-3), losses, strict=True))) == expected


def test_growth_is_the_power_of_the_width():
    rows = [
        {"measured": "distance", "kind": "muP", "width": width, "place": "logits", "value": 3 * width**0.5}
        for width in (64, 128, 512)
    ]
    assert mup.growth(rows, "muP", "logits") == pytest.approx(0.5)
