"""Block shapes: the file of tuned ones, and what a plan reports."""

import json
from dataclasses import asdict

import pytest
import torch

pytest.importorskip("triton")

from retnet.kernels.architectures import ARCHITECTURES
from retnet.kernels.device import power_of_two
from retnet.kernels.retention import tiles
from retnet.kernels.retention.dispatch import plan
from retnet.kernels.retention.tile_space import segment_space, state_space


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """This test's own file of tuned shapes."""
    monkeypatch.setenv("RETNET_CACHE", str(tmp_path))
    tiles.forget_stored_tiles()
    yield tiles.cache_file()
    tiles.forget_stored_tiles()


@pytest.mark.parametrize("size", [8, 16, 24, 64, 512])
def test_tuning_has_candidates_for_every_head_size(size):
    for hardware in ARCHITECTURES.values():
        candidates = list(state_space(hardware, size, 16, 64))
        assert candidates
        assert all(power_of_two(size) >= t.BK and t.BV == 16 and t.BT <= 64 for t in candidates)
        assert list(segment_space(hardware, size, 16, 64))


@pytest.mark.parametrize("text", ["{", "[]", '{"gpu": {"segment": 64}}', '{"gpu": 3}'])
def test_a_file_of_another_form_is_refused_with_its_path(stored, text):
    stored.write_text(text)
    with pytest.raises(ValueError, match=r"tiles.json is not what `retnet tune` writes .*accepted: its file, or none"):
        tiles.stored_tiles()


def test_stored_tiles_are_read_back(stored):
    kept = tiles.tiles_for(ARCHITECTURES["sm_90"], torch.bfloat16, 64, 64, num_states=1000, processors=132)
    stored.write_text(json.dumps({"a gpu": asdict(kept)}))
    assert tiles.stored_tiles() == {"a gpu": kept}


def test_a_plan_distinguishes_decay_per_token_and_shared_heads():
    q, v = torch.zeros(2, 300, 1, 64, dtype=torch.bfloat16), torch.zeros(2, 300, 4, 64, dtype=torch.bfloat16)
    fixed, per_token = (plan(q, v, "chunkwise", None, per_token=p) for p in (False, True))
    assert (fixed["chunk"], per_token["chunk"]) == (128, 64)
    assert "heads_that_share" not in fixed, "segments of 128 are scored a head at a time"
    assert per_token["heads_that_share"]["heads"] == 16
    assert "heads_that_share" not in plan(v, v, "chunkwise", None, per_token=True)
    assert plan(q, v, "recurrent", None, per_token=False)["kernels"] == "step"


def test_walks_take_decays_per_token_and_shared_heads_only_when_they_are_extended(monkeypatch):
    from retnet.kernels.retention import dispatch

    hopper = pytest.importorskip("retnet.kernels.retention.hopper.passes")
    monkeypatch.setattr(dispatch, "is_hopper", lambda device: True)
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    alone, shared = (torch.zeros(2, 300, heads, 64, dtype=torch.bfloat16) for heads in (4, 1))
    calls = {(q.shape[2], p): (q, alone, "chunkwise", None, p) for q in (alone, shared) for p in (False, True)}
    kernels = {name: plan(*call)["kernels"] for name, call in calls.items()}
    assert kernels == {(4, False): "walk", (4, True): "portable", (1, False): "portable", (1, True): "portable"}
    monkeypatch.setattr(dispatch, "extended_walks", True)
    assert {plan(*call)["kernels"] for call in calls.values()} == {"walk"}
