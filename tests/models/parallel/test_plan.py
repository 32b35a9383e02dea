"""Split models: exact on any number of processes, what is refused, and broken sums that are noticed.

Threads in lockstep stand for processes, except in one slow test: the mathematics is the same, and starts at once.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from retnet.layers import tensor_parallel
from retnet.layers.attention import AttentionConfig
from retnet.layers.tensor_parallel import Part, Split
from retnet.models.decode import output
from retnet.models.directory import save_model
from retnet.models.parallel.plan import split_, tensor_parallel_plan
from retnet.ops import tensor_shard
from retnet.ops.tensor_shard import TensorShard
from tests.lockstep import Lockstep, in_lockstep
from tests.ops.threads import ContextThread
from tests.small_models import (
    EXPERTS,
    GLU,
    HYENA,
    LIGHTNING,
    MAMBA2,
    MTP,
    PAPER,
    WIDTH,
    WINDOW,
    random_ids,
    small_config,
    small_model,
)
from tests.torchrun import on_processes

from . import tensor_checks as checks
from .tensor_checks import FOUR, FUSED
from .threads import TensorThread, on_threads


@pytest.mark.parametrize("layer", FOUR)
def test_each_layer_has_the_loss_logits_and_gradients_of_one_process(layer):
    on_threads(2, checks.check_training, [FOUR[layer]])


def test_float32_tied_embeddings_and_a_soft_cap():
    on_threads(
        2, checks.check_training, FUSED[:1], dtype="float32", tie_embeddings=True, logit_scale=0.7, logit_soft_cap=5.0
    )


DECODED = ("gated", "groups", "window", "latents", "latents, keys of one head", "mamba2", "mamba1")


def test_states_are_split_by_head_and_decoding_is_that_of_one_process():
    on_threads(2, checks.check_decoding, [FOUR[name] for name in DECODED])


def test_generation_has_the_tokens_of_one_process():
    on_threads(2, checks.check_generation, FUSED[:2])


@pytest.mark.parametrize("tied", [False, True])
def test_parts_join_to_the_whole_model(tied):
    on_threads(2, checks.check_whole, [FOUR["groups"], FOUR["mamba2"]], tied)


def test_copies_of_a_split_model_accumulate_the_gradients_of_weights_that_all_processes_hold():
    on_threads(2, checks.check_accumulation, [FOUR["groups"], FOUR["mamba2"]])


@pytest.mark.parametrize("level", ["light", "medium", "layer"])
def test_recomputed_layers_are_summed_again(level):
    on_threads(2, checks.check_recompute, [FOUR["conv"], FOUR["mamba2"]], level)


def test_rows_in_shards_of_a_split_model_have_the_loss_and_gradients_of_one_process():
    """Four processes: two parts of a model, for each of two parts of a row with packed documents."""
    model = small_model([FOUR["conv"], FOUR["window"], FOUR["mamba2"]], dtype="float64").train()
    ids, labels, bounds = random_ids(1, 24), random_ids(1, 24, seed=1), [0, 5, 17, 24]
    whole = model.loss(ids, labels, cu_seqlens=torch.tensor(bounds))
    whole.backward()
    parts, shards = [Lockstep(2), Lockstep(2)], [Lockstep(2), Lockstep(2)]

    def work(rank: int, _: Lockstep) -> None:
        place, head = divmod(rank, 2)
        part = split_(copy.deepcopy(model), TensorThread(parts[place], head, 2))
        part.zero_grad()
        shard = ContextThread.part(place, 2, 24, bounds, shards[head])
        mine = slice(12 * place, 12 * place + 12)
        loss = part.loss(ids[:, mine], labels[:, mine], context=shard)
        loss.backward()
        wrong = checks.compare("the loss", shard.total(loss), whole)
        for p in part.parameters():
            p.grad = shard.total(p.grad)
        wrong += checks.compare_gradients(part, model)
        assert not wrong, wrong

    in_lockstep(4, work)


def test_a_split_model_is_not_saved_as_a_whole_one(tmp_path):
    model = split_(small_model([FOUR["paper"]]), TensorShard(None, 1, 2))
    with pytest.raises(ValueError, match="part 1 of 2 of a split model; accepted: a whole one"):
        save_model(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_adapters_and_quantised_weights_are_refused_before_anything_is_split():
    class Adapted(torch.nn.Linear):
        pass

    model = small_model([FOUR["paper"]])
    model.layers[0].mixer.q_proj = Adapted(WIDTH, WIDTH)
    with pytest.raises(ValueError, match=r"q_proj.weight is of a Adapted; accepted: a plain linear layer"):
        split_(model, TensorShard(None, 0, 2))
    assert model.shard is None


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_everything_in_threads(size):
    for layer in FOUR.values():
        if size != 3:
            on_threads(size, checks.check_training, [layer])
    if size == 3:  # the vocabulary does not divide, and one process has more of it
        three = replace(PAPER, mixer=replace(PAPER.mixer, num_heads=3, key_dim=24, value_dim=48))
        three = [replace(three, feed_forward=replace(PAPER.feed_forward, hidden_dim=33))]
        on_threads(3, checks.check_training, three)
        on_threads(3, checks.check_engine, three)
        return
    on_threads(size, checks.check_all)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_compute_what_one_does(processes):
    assert on_processes(processes, checks.__file__) == "equal"


def swapped(split: Split, x: Tensor, shard: TensorShard) -> Tensor:
    """The heads of another process, for weights by rows."""
    other = shard.size - 1 - shard.rank if split.dim == 0 else shard.rank
    return TAKE(split, x, replace(shard, rank=other))


def of_one_product(split: Split, x: Tensor, shard: TensorShard) -> Tensor:
    """Contiguous rows of a product of several maps, whatever they are."""
    return TAKE(Split(split.dim, (Part(sum(part.size for part in split.parts)),)), x, shard)


TAKE = Split.take
MUTATIONS = {
    "no sum of outputs": (TensorShard, "total", lambda shard, x: x, "gated"),
    "no sum of gradients": (TensorShard, "share", lambda shard, x: x, "gated"),
    "the gradient of a sum summed again": (
        tensor_shard._Total,
        "backward",
        staticmethod(lambda ctx, grad: (2 * grad, None)),
        "gated",
    ),
    "no sum of shared weights' gradients": (
        tensor_parallel._SumOfHeld,
        "__call__",
        lambda held, grad: grad.clone(),
        "groups",
    ),
    "swapped heads": (Split, "take", swapped, "gated"),
    "a product split as one map": (Split, "take", of_one_product, "mamba2 in groups"),
    "decays of the first heads": (
        type(PAPER.mixer),
        "part",
        lambda config, rank, size: PART(config, 0, size),
        "paper",
    ),
}
PART = type(PAPER.mixer).part


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_split_is_noticed(monkeypatch, mutation):
    *change, layer = MUTATIONS[mutation]
    monkeypatch.setattr(*change)
    with pytest.raises(AssertionError, match="differs"):
        on_threads(2, checks.check_training, [FOUR[layer]])


def test_processes_that_draw_their_own_tokens_are_noticed(monkeypatch):
    monkeypatch.setattr(TensorThread, "first_", lambda shard, x: x)
    with pytest.raises(AssertionError, match="temperature"):
        on_threads(2, checks.check_generation, FUSED[:1])


def test_a_fused_step_without_its_sums_is_noticed(monkeypatch):
    monkeypatch.setattr(output, "OutputLinear", type("Other", (), {}))
    with pytest.raises(AssertionError, match="temperature"):
        on_threads(2, checks.check_generation, FUSED[:1])


REFUSED = {
    "num_heads is 2 on 4 processes; accepted: a multiple of 4": PAPER,
    "num_kv_heads is 2 on 4 processes; accepted: a multiple of 4, or 1": WINDOW,
    "inner_dim / head_dim is 2 on 4 processes": replace(MAMBA2, mixer=replace(MAMBA2.mixer, head_dim=32)),
    "num_groups is 2 on 4 processes; accepted: a multiple of 4, or 1": replace(
        MAMBA2, mixer=replace(MAMBA2.mixer, num_groups=2)
    ),
    "its filters are one network.*accepted when split: retention, attention, latent_attention, mamba1, mamba2": HYENA,
    "mixture of experts": replace(FOUR["paper"], feed_forward=EXPERTS),
    "hidden_dim is 33 on 4 processes": replace(FOUR["paper"], feed_forward=replace(GLU, hidden_dim=33)),
    "head_norm_groups is 2 on 4 processes; accepted: a multiple of 4": LIGHTNING,
    "inner_norm is 'rms'": replace(FOUR["paper"], feed_forward=replace(GLU, inner_norm="rms")),
    "inner_dim is 66 on 4": replace(FOUR["mamba1"], mixer=replace(FOUR["mamba1"].mixer, inner_dim=66)),
    "num_heads is 6 on 4": replace(WINDOW, mixer=AttentionConfig(6, 1, head_dim=8)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_layers_that_do_not_divide_are_refused_by_name(message):
    model = small_model([FOUR["paper"], REFUSED[message]])
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"layer 1 (is|has) .*{message}"):
        split_(model, TensorShard(None, 0, 4))
    assert model.shard is None
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_multi_token_prediction_is_refused_by_name():
    model = small_model([FOUR["paper"]], mtp=MTP)
    with pytest.raises(ValueError, match="multi-token prediction, which is not divided; accepted when split: mtp None"):
        split_(model, TensorShard(None, 0, 2))
    assert model.shard is None


def test_the_plan_names_every_module_that_is_split():
    config = small_config([FOUR["paper"], FOUR["mamba2"]])
    assert set(tensor_parallel_plan(config, 2)) == {"", "layers.0.mixer", "layers.0.feed_forward", "layers.1.mixer"}


def test_a_split_model_is_not_split_again():
    model = split_(small_model([FOUR["paper"]]), TensorShard(None, 0, 2))
    assert model.layers[0].mixer.q_proj.weight.shape == (WIDTH // 2, WIDTH)
    with pytest.raises(ValueError, match="part 0 of 2 already"):
        split_(model, TensorShard(None, 0, 2))


def test_ids_outside_the_vocabulary_raise_on_every_process():
    for rank in range(2):
        model = split_(small_model([FOUR["paper"]]), TensorShard(None, rank, 2))
        for token in (-1, 61):
            with pytest.raises(IndexError):
                model.embedding(torch.tensor([[token]]))
