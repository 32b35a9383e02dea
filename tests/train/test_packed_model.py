"""The training model on packed rows: no leaks, carried states, losses by their share of the step."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice, pairwise

import pytest
import torch

from retnet.data import PackedDataset, open_corpus
from retnet.models.lm import LanguageModel
from retnet.stack.resolve import resolve_config, resolve_model
from retnet.train.batches import FACTS, RowStream, collate
from retnet.train.inputs import open_data
from retnet.train.packed_model import PackedForCausalLM
from retnet.train.trainer import PackedTrainer, RunOptions
from tests.small_models import BYTES, EXPERTS, MTP, PAPER, small_model

from .conftest import recipe_for

LENGTH, LANES = 40, 4


def make_model(**options) -> PackedForCausalLM:
    """Weights at unit gain, so that leaks and lost states show."""
    return PackedForCausalLM.wrap(small_model(**BYTES, **options)).eval()


def forward(model, batch, **options):
    inputs = {name: x for name, x in batch.items() if name != FACTS}
    return model(**inputs, num_items_in_batch=batch[FACTS].num_targets, **options)


@pytest.fixture
def corpus(text_folder):
    return open_corpus(text_folder)


def experts(policy):
    """Layers whose experts are full in training. Losses of routers belong to no document, and have no weight here."""
    moe = replace(EXPERTS, capacity_factor=0.7, capacity_policy=policy, load_balance_coef=0.0)
    return [replace(PAPER, feed_forward=moe)] * 2


@pytest.mark.parametrize(
    ("stack", "rounding"),
    [("retention", 0.0), (experts("overflow"), 1e-5), (experts("drop"), 1e-5), (experts("pad"), 0.0)],
    ids=["retention", "overflow", "drop", "pad"],
)
def test_a_token_changes_no_training_loss_of_other_documents(byte_model, text_folder, tmp_path, stack, rounding):
    """Through the whole trainer: rows, batches, model and loss. Products of fewer rows may round differently."""
    recipe = recipe_for(byte_model, text_folder, tmp_path, length=200)
    arguments = recipe.training_arguments()
    data, model = open_data(recipe, arguments), make_model(stack=stack).train()
    trainer = PackedTrainer(model, arguments, data.train, data.valid, RunOptions())
    batch = next(iter(trainer.get_train_dataloader()))
    bounds = batch["cu_seq_lens_q"].tolist()
    number = next(n for n in range(3, len(bounds)) if bounds[n + 1] - bounds[n] > 20)
    victim = range(bounds[number], bounds[number + 1])
    changed = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    ids = changed["input_ids"].view(-1)
    ids[victim[3]] = (ids[victim[3]] + 1) % 256

    def losses_by_token(inputs):
        """The loss of each document, with the targets of the others ignored."""
        targets = inputs["shift_labels"].flatten()
        values = []
        for begin, end in pairwise(bounds):
            only = torch.full_like(targets, -100)
            only[begin:end] = targets[begin:end]
            kept = inputs | {"shift_labels": only.view_as(inputs["shift_labels"])}
            with torch.no_grad():
                values.append(trainer.compute_loss(model, kept, num_items_in_batch=1).item())
        return values

    before, after = losses_by_token(batch), losses_by_token(changed)
    assert before.pop(number) != after.pop(number)
    assert after == pytest.approx(before, rel=rounding, abs=0.0)


def test_without_carried_states_the_loss_of_a_row_is_that_of_its_pieces(corpus):
    model = make_model()
    batch = collate([RowStream(PackedDataset(corpus, LENGTH, 0))[i] for i in range(3)])
    loss = forward(model, batch).loss
    ids, targets, bounds = (batch[n].flatten() for n in ("input_ids", "shift_labels", "cu_seq_lens_q"))
    nats = 0.0
    for begin, end in pairwise(bounds):
        log_p = model.model(ids[None, begin:end]).logits[0].log_softmax(-1)
        kept = targets[begin:end] != -100
        nats -= log_p[kept].gather(1, targets[begin:end][kept, None]).sum()
    assert loss.item() == pytest.approx(nats.item() / batch[FACTS].num_targets, rel=1e-5)


@pytest.mark.parametrize("policy", ["overflow", "drop", "pad"])
def test_the_gradient_of_experts_is_the_same_in_batches_of_any_size(corpus, policy):
    """As on any number of processes: each reads a part of the rows of a step."""
    model = make_model(stack=experts(policy), dtype="float64").train()
    rows = RowStream(PackedDataset(corpus, LENGTH, 0))
    num_targets = collate([rows[i] for i in range(4)])[FACTS].num_targets
    gradients = []
    for size in (1, 2, 4):
        model.zero_grad()
        for begin in range(0, 4, size):
            batch = collate([rows[i] for i in range(begin, begin + size)])
            inputs = {name: x for name, x in batch.items() if name != FACTS}
            model(**inputs, num_items_in_batch=num_targets).loss.backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("stack", ["retention", "arch_expert_research_mini"])
def test_with_carried_states_the_loss_is_that_of_whole_documents(corpus, stack):
    """Equal to reading each document of a lane in one piece, over the steps of an epoch."""
    model = make_model() if stack == "retention" else PackedForCausalLM.wrap(resolve_model(stack)).eval()
    rows = PackedDataset(corpus, LENGTH, 0, carry_state=True, lanes=LANES)
    stream = RowStream(rows)
    lanes, nats = None, 0.0
    texts: list[list[torch.Tensor]] = [[] for _ in range(LANES)]
    steps = min(12, len(rows) // LANES)
    with torch.no_grad():
        for step in range(steps):
            batch = collate([stream[step * LANES + lane] for lane in range(LANES)])
            output = forward(model, batch, lanes=lanes, carry=True)
            lanes = output.past_key_values.state
            nats += output.loss.item() * batch[FACTS].num_targets
            for lane in range(LANES):
                texts[lane].append(torch.stack([batch["input_ids"][lane], batch["shift_labels"][lane]]))
    expected, continued = 0.0, 0
    for lane in range(LANES):
        ids, targets = torch.cat(texts[lane], 1)
        starts = [0, *(i for i in range(1, len(ids)) if ids[i] == 256), len(ids)]
        for begin, end in pairwise(starts):
            continued += begin // LENGTH != (end - 1) // LENGTH
            log_p = model.model(ids[None, begin:end]).logits[0].log_softmax(-1)
            kept = targets[begin:end] != -100
            expected -= log_p[kept].gather(1, targets[begin:end][kept, None]).sum().item()
    assert continued > LANES  # documents continued from row to row
    assert nats == pytest.approx(expected, rel=1e-4)


def test_multi_token_prediction_continues_over_rows_where_states_are_carried(corpus):
    """Its loss over the steps of an epoch is that of each document read in one piece, without its first k tokens."""
    model = make_model(mtp=MTP).train()
    rows = PackedDataset(corpus, LENGTH, 0, carry_state=True, lanes=LANES)
    stream, lanes, ours, count = RowStream(rows), None, 0.0, 0
    texts: list[list[torch.Tensor]] = [[] for _ in range(LANES)]
    with torch.no_grad():
        for step in range(6):
            batch = collate([stream[step * LANES + lane] for lane in range(LANES)])
            output = forward(model, batch, lanes=lanes, carry=True)
            lanes = output.past_key_values.state
            ours += output.mtp_loss.item() * batch[FACTS].num_targets
            count += batch[FACTS].num_targets
            for lane in range(LANES):
                texts[lane].append(torch.stack([batch["input_ids"][lane], batch["shift_labels"][lane]]))
        theirs = 0.0
        for lane in range(LANES):
            ids, targets = torch.cat(texts[lane], 1)
            starts = [0, *(i for i in range(1, len(ids)) if ids[i] == 256), len(ids)]
            for begin, end in pairwise(starts):
                one, labels = ids[None, begin:end], targets[None, begin:end]
                hidden, _ = model.model.hidden(one)
                theirs += model.model.ahead(hidden, one, labels=labels).loss.item() * (labels != -100).sum().item()
    assert ours / count == pytest.approx(theirs / count, rel=1e-5)
    assert forward(model.eval(), batch).mtp_loss is None


def test_no_gradient_flows_into_the_carried_state(corpus):
    model = make_model().train()
    stream = RowStream(PackedDataset(corpus, LENGTH, 0, carry_state=True, lanes=LANES))
    first, second = (collate([stream[step * LANES + lane] for lane in range(LANES)]) for step in range(2))
    lanes = forward(model, first, carry=True).past_key_values.state
    assert not any(x.requires_grad for x in lanes.named_tensors().values())
    before = {name: x.clone() for name, x in lanes.named_tensors().items()}
    forward(model, second, lanes=lanes, carry=True).loss.backward()
    assert all(torch.equal(x, before[name]) for name, x in lanes.named_tensors().items())
    assert model.model.embedding.weight.grad.abs().sum() > 0


def test_router_losses_count_by_a_batchs_share_of_the_step(corpus):
    """The loss of a batch in a step of two is its own loss times its share of the targets."""
    model = PackedForCausalLM.wrap(resolve_model("arch_expert_retnet_moe_mini")).train()
    stream = RowStream(PackedDataset(corpus, LENGTH, 0))
    batches = [collate([stream[i]]) for i in range(2)]
    total = sum(batch[FACTS].num_targets for batch in batches)
    extra = []
    for batch in batches:
        inputs = {name: x for name, x in batch.items() if name != FACTS}
        with torch.no_grad():
            alone = [model(**inputs, num_items_in_batch=n).loss.item() for n in (batch[FACTS].num_targets, total)]
        extra.append(alone)
        share = batch[FACTS].num_targets / total
        assert alone[1] == pytest.approx(share * alone[0], rel=1e-5)
    with torch.no_grad():
        inputs = {name: x for name, x in batches[0].items() if name != FACTS}
        evaluated = model.eval()(**inputs, num_items_in_batch=batches[0][FACTS].num_targets).loss.item()
    assert extra[0][0] > evaluated  # validation has the nats alone


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_logged_loss_is_the_cross_entropy_with_the_other_losses_beside_it(
    byte_model, text_folder, tmp_path, accumulation
):
    """The first step's log equals the parts of its batches, computed from the weights before it."""
    settings = {"max_steps": 1, "gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4}
    recipe = recipe_for(byte_model, text_folder, tmp_path, **settings)
    arguments = recipe.training_arguments()
    data = open_data(recipe, arguments)
    weighted = replace(EXPERTS, load_balance_coef=0.5, z_loss_coef=0.1)
    model = make_model(stack=[replace(PAPER, feed_forward=weighted)] * 2, mtp=MTP).train()
    trainer = PackedTrainer(model, arguments, data.train, data.valid, RunOptions())
    batches = list(islice(trainer.get_train_dataloader(), accumulation))
    total = sum(batch[FACTS].num_targets for batch in batches)
    total_loss = ahead = nats = 0.0
    with torch.no_grad():
        for batch in batches:
            inputs = {name: x for name, x in batch.items() if name != FACTS}
            output = model(**inputs, num_items_in_batch=total)
            total_loss, ahead = total_loss + output.loss.item(), ahead + output.mtp_loss.item()
            hidden, _ = model.model.hidden(inputs["input_ids"].view(1, -1), cu_seqlens=inputs["cu_seq_lens_q"])
            targets = inputs["shift_labels"].flatten()
            nats += model.model.mean_nats(hidden[0], targets).item() * (targets != -100).sum().item() / total
    trainer.train()
    log = trainer.state.log_history[0]
    routers = total_loss - ahead - nats
    assert min(routers, ahead) > 0.1
    assert log["loss"] == pytest.approx(nats, rel=1e-5)
    assert log["router_loss"] == pytest.approx(routers, rel=1e-4)
    assert log["mtp_loss"] == pytest.approx(ahead, rel=1e-4)
    assert log["bits_per_byte"] == pytest.approx(log["loss"] / math.log(2) / trainer.rows.rows.bytes_per_target)


def test_the_logits_of_all_tokens_are_never_computed(corpus, monkeypatch):
    model = make_model()
    monkeypatch.setattr(model.model, "logits", lambda hidden: pytest.fail("logits of all tokens were made"))
    batch = collate([RowStream(PackedDataset(corpus, LENGTH, 0))[0]])
    for training in (True, False):
        assert forward(model.train(training), batch).loss > 0


def test_it_is_saved_as_the_class_that_transformers_loads(tmp_path, corpus):
    from retnet.models.hf import RetNetForCausalLM

    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = RetNetForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["RetNetForCausalLM"]
    assert torch.equal(loaded.model.embedding.weight, model.model.embedding.weight)


@pytest.mark.gpu
@pytest.mark.parametrize("stack", ["retnet-125m", "recipes/llama-125m.yml"])
def test_a_compiled_step_on_a_gpu_has_the_gradients_of_the_cpu(stack):
    """A step of the Wikipedia recipes: 8 rows of 2048 laid end to end, bfloat16, random document boundaries.

    The first token of a document has no target: its normalized retention output depends on q and k only through
    rounding (docs/reference/numerics.md).
    """
    config = resolve_config(stack)
    config = replace(config, layers=config.layers[:1], vocab_size=500, init="normal", init_std=0.04)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for documents in (40, 25):
        bounds = torch.randint(1, 8 * 2048, (documents,), generator=generator)
        bounds = torch.cat([bounds, torch.arange(0, 9) * 2048]).unique()
        ids = torch.randint(500, (8, 2048), generator=generator)
        targets = ids.roll(-1, 1).flatten().index_fill(0, bounds[:-1], -100).view_as(ids)
        batches.append({"input_ids": ids, "labels": ids, "shift_labels": targets, "cu_seq_lens_q": bounds})

    def gradients(device: str) -> list[list[torch.Tensor]]:
        torch._dynamo.reset()
        model = PackedForCausalLM.wrap(LanguageModel(config)).to(device).train()
        if device == "cuda":  # block by block, as in `retnet train`
            for layer in model.model.layers:
                layer.compile()
        found = []
        for batch in batches:
            inputs = {name: x.to(device) for name, x in batch.items()}
            fresh = torch.ones(8, dtype=torch.bool, device=device)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = model(**inputs, begins_fresh=fresh, num_items_in_batch=1000).loss
            found.append([loss.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(loss, [*model.parameters()]))])
        return found

    names = ["loss", *(name for name, _ in LanguageModel(config).named_parameters())]
    for ours, reference in zip(gradients("cuda"), gradients("cpu"), strict=True):
        for name, x, ref in zip(names, ours, reference, strict=True):
            assert (x - ref).norm() <= 3e-2 * ref.norm(), name
