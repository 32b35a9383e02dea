"""Learned initial states: their gradient, what has nothing to learn, and requests that start from them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from retnet.models.fingerprint import fingerprint
from retnet.models.initial_state import LearnedState
from retnet.models.snapshot import Snapshot
from retnet.serve.engine import Engine
from retnet.serve.request import Request
from tests.serve.test_engine import GREEDY, engine_of
from tests.small_models import ALIBI, CONV, PAPER, WINDOW, random_ids, small_model

DOCUMENTS = (1, 7, 23)  # tokens


def learned(model, seed: int = 0, scale: float = 1.0) -> LearnedState:
    """A learned state away from zero."""
    state, generator = LearnedState(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in state.parameters():
            x.normal_(std=scale, generator=generator)
    return state


def start_of(model, **options) -> Snapshot:
    return learned(model, **options).snapshot(model, 0, fingerprint(model))


def packed_loss(model, state: LearnedState, ids, targets) -> torch.Tensor:
    bounds = torch.tensor([0, *torch.tensor(DOCUMENTS).cumsum(0).tolist()])
    hidden, _ = model.hidden(ids[None], state(model, len(DOCUMENTS)), cu_seqlens=bounds)
    return model.mean_nats(hidden[0], targets)


def recurrent_loss(model, state: LearnedState, ids, targets) -> torch.Tensor:
    """The definition: document by document and token by token, each document from a state of its own."""
    nats = []
    for tokens, goals in zip(ids.split(DOCUMENTS), targets.split(DOCUMENTS), strict=True):
        carried = state(model, 1)
        for token, goal in zip(tokens, goals, strict=True):
            output = model(token.view(1, 1), carried, carry=True)
            carried = output.state
            nats.append(F.cross_entropy(output.logits[0, 0], goal))
    return torch.stack(nats).mean()


def test_the_gradient_of_packed_documents_is_that_of_the_recurrence_in_float64():
    model = small_model("hybrid").requires_grad_(False)
    ids, targets = random_ids(31), random_ids(31, seed=1)
    single = learned(model)
    packed_loss(model, single, ids, targets).backward()
    model.double()
    exact, packed = learned(model), learned(model)
    packed.load_state_dict(exact.state_dict())
    single_values = {name: x.double() for name, x in single.state_dict().items()}
    exact.load_state_dict(single_values), packed.load_state_dict(single_values)
    recurrent_loss(model, exact, ids, targets).backward()
    packed_loss(model, packed, ids, targets).backward()
    assert all(x.dtype == torch.float32 for x in single.parameters())
    for one, two, reference in zip(single.parameters(), packed.parameters(), exact.parameters(), strict=True):
        size = reference.grad.norm()
        assert size > 1e-4
        assert (two.grad - reference.grad).norm() < 1e-10 * size
        assert (one.grad - reference.grad).norm() < 5e-5 * size  # float32 through every layer


def test_the_gradient_is_the_slope_of_the_loss():
    model = small_model("hybrid").requires_grad_(False).double()
    ids, targets, state = random_ids(31), random_ids(31, seed=1), learned(model)
    loss = packed_loss(model, state, ids, targets)
    loss.backward()
    direction = [torch.randn_like(x) for x in state.parameters()]
    slope = sum(float((x.grad * d).sum()) for x, d in zip(state.parameters(), direction, strict=True))
    losses = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for x, d in zip(state.parameters(), direction, strict=True):
                x += step * d
            losses.append(float(packed_loss(model, state, ids, targets)))
    assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(slope, rel=1e-6)


def test_a_state_has_the_memories_and_the_inputs_of_convolutions_and_no_caches():
    model = small_model("hybrid")
    state = LearnedState(model)
    names = [("memory",), (), ("memory", "recent"), ("memory", "recent"), (), ("memory", "recent"), ()]
    assert state.fields[:7] == names
    branches = [i for i, layer in enumerate(model.config.layers) if layer.mixer.kind == "branched"]
    assert {name.rpartition("/")[2] for i in branches for name in state.fields[i]} == {"memory", "recent"}
    assert all(not x.any() for x in state.parameters())
    assert state.left_out["attention"][:3] == [1, 4, 6]
    assert set(branches) <= set(state.left_out["attention"]) & set(state.trained_layers)  # attention beside Mamba
    empty, start = model.init_state(2), state(model, 2)
    expected = empty.named_tensors()
    for name, x in start.named_tensors().items():
        assert torch.equal(x, expected[name])
        assert x.dtype == expected[name].dtype


def test_a_model_with_nothing_to_learn_is_refused():
    with pytest.raises(ValueError, match="the layers are attention, which keep no state of constant size; accepted"):
        LearnedState(small_model([ALIBI, WINDOW]))
    with pytest.raises(ValueError, match="layer 1 has keeps_state False; accepted"):
        LearnedState(small_model([PAPER, replace(PAPER, keeps_state=False)]))


@pytest.mark.parametrize("options", [{}, {"deferred_writes": 16}, {"prefix_cache_bytes": 10**7}], ids=str)
def test_requests_that_start_from_a_state_get_the_tokens_of_whole_forwards(options):
    model, ids = small_model("hybrid"), [0, *random_ids(20).tolist()]
    start = start_of(model)
    engine = engine_of(model, **options)
    after, rest = start.begin_of(ids)
    generations = [engine.submit(Request(rest, 8, GREEDY), after), engine.submit(Request(ids, 8, GREEDY))]
    engine.run()
    assert generations[0].tokens != generations[1].tokens
    for generation, state in zip(generations, (start.state, None), strict=True):
        assert generation.output_start == 21
        with torch.no_grad():
            logits = model(torch.tensor([ids + generation.tokens[:-1]]), state).logits[0, 20:]
        assert generation.tokens == logits.argmax(-1).tolist()


def test_a_state_survives_its_file_and_is_refused_by_another_model(tmp_path):
    model = small_model([CONV, PAPER])
    start = start_of(model)
    start.save(tmp_path / "state.safetensors")
    loaded = Snapshot.load(tmp_path / "state.safetensors")
    assert loaded.is_initial
    assert loaded.initial == start.initial
    for name, x in start.state.named_tensors().items():
        assert torch.equal(loaded.state.named_tensors()[name], x)
    other = small_model([CONV, PAPER])
    other.embedding.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="the snapshot is of another model"):
        engine_of(other).check_snapshot(loaded)


def test_states_are_told_apart_by_what_they_hold():
    model = small_model([CONV, PAPER])
    one, other = start_of(model), start_of(model, seed=1)
    assert len({one.initial, other.initial, None}) == 3
    empty = LearnedState(model).snapshot(model, 0, fingerprint(model))
    assert empty.initial is None  # the state that every request starts from
    assert one.ending_with(5).initial == one.initial
    with pytest.raises(ValueError, match="initial is 'x'; accepted"):
        replace(one, initial="x")


def test_a_conversation_remembers_the_state_that_it_began_from():
    model = small_model([CONV, PAPER])
    start, engine = start_of(model), Engine(model, num_slots=1)
    generation = engine.submit(Request([1, 2, 3], 4, GREEDY, keep_state=True), start)
    engine.run()
    assert generation.snapshot is not None
    assert generation.snapshot.initial == start.initial
