"""Block shapes: what is stored on a machine, and what a plan says of them."""

import json
from dataclasses import asdict

import pytest
import torch

pytest.importorskip("triton")

from retnet.kernels.device import power_of_two
from retnet.kernels.retention import tiles
from retnet.kernels.retention.dispatch import plan
from retnet.kernels.retention.tune import _segment_tiles, _state_tiles


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """The file of stored shapes, of this test alone."""
    monkeypatch.setenv("RETNET_CACHE", str(tmp_path))
    tiles.forget_stored_tiles()
    yield tiles.cache_file()
    tiles.forget_stored_tiles()


@pytest.mark.parametrize("size", [8, 16, 24, 64, 512])
def test_every_head_size_has_shapes_to_try(size):
    candidates = list(_state_tiles(size, 16))
    assert candidates
    assert all(power_of_two(size) >= t.BK and t.BV == 16 for t in candidates)
    assert list(_segment_tiles(size, 16))


@pytest.mark.parametrize("text", ["{", "[]", '{"gpu": {"segment": 64}}', '{"gpu": 3}'])
def test_a_file_that_tune_did_not_write_is_refused_by_name(stored, text):
    stored.write_text(text)
    with pytest.raises(ValueError, match=r"tiles.json is not what `retnet tune` writes .*accepted: its file, or none"):
        tiles.stored_tiles()


def test_what_was_stored_is_read(stored):
    kept = tiles.tiles_for("hopper", torch.bfloat16, 64, 64, num_states=1000, processors=132)
    stored.write_text(json.dumps({"a gpu": asdict(kept)}))
    assert tiles.stored_tiles() == {"a gpu": kept}


def test_a_plan_tells_decays_a_token_and_heads_that_share_apart():
    q, v = torch.zeros(2, 300, 1, 64, dtype=torch.bfloat16), torch.zeros(2, 300, 4, 64, dtype=torch.bfloat16)
    fixed, per_token = (plan(q, v, "chunkwise", None, per_token=p) for p in (False, True))
    assert (fixed["chunk"], per_token["chunk"]) == (128, 64)
    assert "heads_that_share" not in fixed, "segments of 128 are scored a head at a time"
    assert per_token["heads_that_share"]["heads"] == 16
    assert "heads_that_share" not in plan(v, v, "chunkwise", None, per_token=True)
    assert plan(q, v, "recurrent", None, per_token=False)["kernels"] == "step"
