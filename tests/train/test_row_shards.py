"""Rows that processes share: the batch that each holds, the loss of the parts, and what is refused.

Threads in lockstep stand for processes.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from retnet.data import PackedDataset, open_corpus
from retnet.train import row_shards
from retnet.train.batches import FACTS, RowStream, collate
from retnet.train.changes import run_facts
from retnet.train.inputs import initial_model, open_data
from retnet.train.packed_model import PackedForCausalLM
from retnet.train.row_shards import RowShards, check_row_shards, check_shared_layers
from retnet.train.run import train
from retnet.train.throughput import Meter, Peak
from tests.ops.context_checks import compare, settle
from tests.ops.threads import ContextThread, on_shards
from tests.small_models import BYTES, CONV, EXPERTS, HYENA, MAMBA2, NOPE, PAPER, small_config, small_model

from .conftest import recipe_for
from .reordered import TOKENS, head_to_tail_batch

LENGTH = 48


@pytest.fixture
def batch(short_texts) -> dict[str, Any]:
    """Three rows of documents, and one that fills up a validation batch."""
    stream = RowStream(PackedDataset(open_corpus(short_texts), LENGTH, seed=3))
    rows = collate([stream[number] for number in (0, 1, 4, -1)])
    assert len(rows["cu_seq_lens_q"]) > 7, "documents end inside rows"
    return rows


def test_the_shards_of_a_batch_are_its_tokens_in_order(batch):
    parts = [RowShards(rank=rank, size=3).cut(batch) for rank in range(3)]
    for name in TOKENS:
        assert torch.equal(torch.cat([part[name] for part in parts], 1), batch[name].reshape(1, -1)), name
    assert all("cu_seq_lens_q" not in part for part in parts)
    assert any(part["context"].continues for part in parts), "a border lies inside a document"
    facts, own = batch[FACTS], [part[FACTS] for part in parts]
    assert sum(each.num_targets for each in own) == facts.num_targets
    assert [each.num_tokens for each in own] == [LENGTH * 4 // 3] * 3
    assert sum(each.seen for each in own) == pytest.approx(facts.seen, abs=3)
    assert {each.rows for each in own} == {facts.rows}


def test_the_label_at_a_border_is_the_first_token_of_the_next_shard(batch):
    first, second = (RowShards(rank=rank, size=8).cut(batch) for rank in range(2))
    assert first["shift_labels"][0, -1] == second["input_ids"][0, 0] >= 0


def test_one_process_gets_the_batch_itself(batch):
    assert RowShards().cut(batch) is batch


def check_batch(of, size: int, batch: dict[str, Any], reordered: bool) -> None:
    """Losses and gradients of all shards sum to those of the batch, which is 3/4 of a step."""
    place = of(size, None)
    shards = RowShards(rank=place.rank, size=size, context=place.group)
    model = PackedForCausalLM.wrap(small_model((CONV, NOPE, MAMBA2), dtype="float64", **BYTES)).train()
    items = 4 * batch[FACTS].num_targets // 3
    own = shards.cut(head_to_tail_batch(batch, size) if reordered else batch)
    whole, part = (
        model(**{name: x for name, x in each.items() if name != FACTS}, num_items_in_batch=items).loss
        for each in (batch, own)
    )
    expected = torch.autograd.grad(whole, list(model.parameters()))
    part.backward()
    shard = own["context"]
    compare("loss", shard.total(part), whole.detach())
    for (name, p), grad in zip(model.named_parameters(), expected, strict=True):
        assert p.grad is not None, name
        compare(f"the gradient of {name}", shard.total(p.grad), grad)
    settle()


@pytest.mark.parametrize("size", [2, 3])
def test_losses_and_gradients_of_the_shards_sum_to_those_of_the_batch(monkeypatch, batch, size):
    monkeypatch.setattr(row_shards, "ContextShard", ContextThread)
    on_shards(size, check_batch, batch, False)


def test_a_reordered_row_is_noticed(monkeypatch, batch):
    monkeypatch.setattr(row_shards, "ContextShard", ContextThread)
    with pytest.raises(AssertionError, match="loss differs"):
        on_shards(2, check_batch, batch, True)


def arguments(world: int = 4, process: int = 0, **changes: Any) -> Any:
    values = {"world_size": world, "process_index": process, "device": torch.device("cpu"), "deepspeed": None}
    values |= {"parallelism_config": None, "average_tokens_across_devices": True}
    return SimpleNamespace(**values | changes)


def test_consecutive_processes_share_rows(monkeypatch):
    made = []

    def mesh(device: str, shape: tuple[int, int], mesh_dim_names: tuple[str, str]) -> Any:
        made.append((device, shape, mesh_dim_names))
        return SimpleNamespace(get_group=lambda name: name)

    monkeypatch.setattr(row_shards, "init_device_mesh", mesh)
    places = [RowShards.of(2, arguments(6, process)) for process in range(6)]
    assert [(place.index, place.rank) for place in places] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert {(place.groups, place.size, place.context) for place in places} == {(3, 2, "context")}
    assert set(made) == {("cpu", (3, 2), ("data", "context"))}
    assert [RowShards.of(1, arguments(2, process)) for process in range(2)] == [RowShards(0, 2), RowShards(1, 2)]


def test_a_group_counts_its_tokens_once(batch):
    """Rates per second of all processes, where 2 of 4 share rows."""
    own = RowShards(rank=1, size=2).cut(batch)[FACTS]
    alone, shared = (Meter(small_config(), Peak(1e12, "a fixed rate"), count) for count in (2, 4))
    alone._began = shared._began = 0.0  # long ago, so that both times are equal
    alone.count(batch[FACTS])
    shared.count(own)
    whole, parts = alone.read(), shared.read()
    assert parts["tokens_per_second"] == pytest.approx(whole["tokens_per_second"], rel=1e-2)
    assert parts["mfu"] == pytest.approx(whole["mfu"] / 2, rel=1e-2)  # of twice as many devices


REFUSED = [
    ({"context_parallel": 3}, {}, r"3 with 4 processes; accepted: a divisor of the number of processes \(1, 2, 4\)"),
    ({"context_parallel": 2}, {"world": 1}, r"with 1 process; accepted: a divisor .* --nproc_per_node=N with a mult"),
    ({"context_parallel": 4, "length": 50}, {}, "4 with length 50; accepted: a multiple of 4, such as 48 or 52"),
    ({"context_parallel": 4, "length": 3}, {}, "accepted: a multiple of 4, such as 4$"),
    ({"context_parallel": 2, "carry_state": True}, {}, "2 with carry_state; accepted: carry_state=false"),
    ({"context_parallel": 2}, {"average_tokens_across_devices": False}, "across_devices=false; accepted: true"),
    ({"context_parallel": 2}, {"deepspeed": {}}, "2 with deepspeed; accepted: DDP, or fsdp=true"),
    ({}, {"parallelism_config": {"cp_size": 2}}, "cp_size of accelerate's .* is 2.*; accepted: context_parallel=2 w"),
    ({}, {"parallelism_config": {"sp_size": 4}}, "sp_size of accelerate's .* is 4.*; accepted: context_parallel=4 w"),
    ({"context_parallel": 2}, {"parallelism_config": {"tp_size": 2}}, "2 with tp_size of parallelism_config; accepted"),
]


@pytest.mark.parametrize(("settings", "changes", "message"), REFUSED)
def test_settings_that_shared_rows_do_not_go_with_are_refused(byte_model, tmp_path, settings, changes, message):
    recipe = recipe_for(byte_model, "texts", tmp_path, **settings)
    sizes = changes.pop("parallelism_config", None)
    if sizes is not None:
        changes = changes | {
            "parallelism_config": SimpleNamespace(**{"cp_size": 1, "sp_size": 1, "tp_size": 1} | sizes)
        }
    with pytest.raises(ValueError, match=message):
        check_row_shards(recipe, arguments(**changes))


@pytest.mark.parametrize("world", [2, 4])
def test_settings_that_go_together_are_accepted(byte_model, tmp_path, world):
    check_row_shards(recipe_for(byte_model, "texts", tmp_path, context_parallel=2), arguments(world))


def test_sizes_that_accelerate_reads_from_the_environment_are_refused(byte_model, tmp_path, monkeypatch):
    """As set by `accelerate launch --use_parallelism_config --parallelism_config_cp_size 2`."""
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    recipe = recipe_for(byte_model, "texts", tmp_path)
    check_row_shards(recipe, arguments())  # accelerate reads it only with the other
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    with pytest.raises(ValueError, match=r"cp_size .* is 2.*accepted: context_parallel=2"):
        check_row_shards(recipe, arguments())


def test_a_run_of_one_process_is_refused_before_its_data_are_opened(byte_model, tmp_path, console):
    with pytest.raises(ValueError, match="context_parallel is 2 with 1 process"):
        train(recipe_for(byte_model, tmp_path / "none", tmp_path / "out", context_parallel=2), console)


@pytest.mark.parametrize(
    ("layer", "message"), [(HYENA, "as long as the row"), (replace(PAPER, feed_forward=EXPERTS), "mixture of experts")]
)
def test_layers_that_need_whole_rows_are_refused_by_name(byte_model, tmp_path, layer, message):
    config = small_config((PAPER, layer))
    check_shared_layers(recipe_for(byte_model, "texts", tmp_path), config)
    recipe = recipe_for(byte_model, "texts", tmp_path, context_parallel=2)
    with pytest.raises(ValueError, match=rf"context_parallel is 2 with .*layer 1 is .*{message}.*accepted with"):
        check_shared_layers(recipe, config)


@pytest.mark.parametrize("value", [0, -1, "two"])
def test_sizes_that_are_not_counts_are_refused(byte_model, tmp_path, value):
    with pytest.raises(ValueError, match="context_parallel is"):
        recipe_for(byte_model, "texts", tmp_path, context_parallel=value)


def test_processes_that_share_rows_count_once_in_a_step(byte_model, text_folder, tmp_path, monkeypatch):
    recipe = recipe_for(byte_model, text_folder, tmp_path, context_parallel=2)
    given = recipe.training_arguments()
    data = open_data(recipe, given)
    model = initial_model(recipe, data.corpus, 0)
    monkeypatch.setattr(type(given), "world_size", property(lambda self: 4))
    assert run_facts(recipe, given, data, model)["rows_per_step"] == 8 * 2 * 2


@pytest.mark.parametrize(("others", "is_refused"), [([0, 0], False), ([0, 1], True)])
def test_processes_with_other_data_are_refused(monkeypatch, others, is_refused):
    def gather(found: list[torch.Tensor], mine: torch.Tensor, group: object) -> None:
        for each, other in zip(found, others, strict=True):
            each.copy_(mine + other)

    monkeypatch.setattr(row_shards.dist, "all_gather", gather)
    shards = RowShards(size=2)
    if not is_refused:
        shards.check_same_data(["abc"], torch.device("cpu"))
        return
    with pytest.raises(ValueError, match=r"processes \[1\] of the 2 that share rows opened other data"):
        shards.check_same_data(["abc"], torch.device("cpu"))
