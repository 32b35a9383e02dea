"""Requests with NaN in their tokens fail alone; states made with old weights are not used with new ones."""

import pytest
import torch
from torch.nn.utils import parametrize

from retnet.models.decode.sampling import Sampling
from retnet.serve.engine import Engine
from retnet.serve.request import Refused, Request
from retnet.serve.speculation import Speculation
from tests.small_models import STACKS, hf_model, prompt, small_model, unit_gain_

from .test_engine import alone, engine_of

GREEDY = Sampling(temperature=0)
BAD = 60  # a token with NaN in its embedding
SERVED = [name for name in STACKS if name != "every mixer"]


def poisoned(stack: str):
    model = small_model(stack, dtype="float64")
    with torch.no_grad():
        model.embedding.weight[BAD, 3] = float("nan")
    return model


def without_bad(length: int, seed: int = 0) -> list[int]:
    return [token % BAD for token in prompt(length, seed)]


def every_third() -> list:
    """Stacks, options of an engine and places of a token: every pair of values is in a fast test."""
    cases = []
    for i, stack in enumerate(SERVED):
        for j, options in enumerate(({}, {"speculation": Speculation(3)}, {"deferred_writes": 16})):
            for k, place in enumerate(("first", "inside", "last")):
                marks = () if (i + j + k) % 3 == 0 else pytest.mark.slow
                cases.append(pytest.param(stack, options, place, marks=marks, id=f"{place}-{options}-{stack}"))
    return cases


@pytest.mark.parametrize(("stack", "options", "place"), every_third())
def test_a_token_that_makes_nan_fails_its_request_alone(stack, options, place):
    model = poisoned(stack)
    good = Request(without_bad(7, seed=1) * 2, 8, Sampling(temperature=0, logit_bias={BAD: -float("inf")}))
    expected = alone(model, good, **options)
    assert expected.finish_reason == "length"
    ids = without_bad(12)
    ids[{"first": 0, "inside": 9, "last": -1}[place]] = BAD
    engine = engine_of(model, **options)
    kept = engine.submit(good)
    engine.step()
    bad = engine.submit(Request(ids, 12, GREEDY))
    engine.run()
    assert bad.finish_reason == "failed"
    assert "not finite" in bad.error or "cannot be read" in bad.error
    assert kept.tokens == expected.tokens
    assert engine.pool.num_free == engine.pool.num_slots


@pytest.mark.parametrize("stack", SERVED)
def test_a_drafted_token_that_makes_nan_fails_no_request(stack):
    """The draft repeats what followed the same tokens before; what really follows is another token."""
    model = poisoned(stack)
    forbidden = Sampling(temperature=0, logit_bias={BAD: -float("inf")})
    request = Request(without_bad(9), 20, forbidden)
    expected = alone(model, request).tokens
    engine = engine_of(model, speculation=Speculation(3))
    drafted = []

    def draft(slot, seen, count):
        drafted.append(min(count, 3))
        return [expected[len(seen) - 9], BAD, 1][:count] if len(seen) < 28 else []

    engine.drafter.draft = draft
    generation = engine.submit(request)
    engine.run()
    assert max(drafted) == 3
    assert (generation.tokens, generation.finish_reason) == (expected, "length")


def test_weights_that_are_nan_fail_requests_and_no_step():
    model = small_model("both decays")
    with torch.no_grad():
        model.layers[1].mixer.decay_proj.weight[0, 0] = float("nan")
    for options in ({}, {"speculation": Speculation(3)}):
        assert alone(model, Request(prompt(1), 9, GREEDY), **options).finish_reason == "failed"


def merge(model) -> None:
    """A change through `.data`, which leaves no version, as adapters make when they are merged."""
    weight = model.layers[0].mixer.v_proj.weight
    weight.data += 0.5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(weight)


def change_one_row(model) -> None:
    model.layers[1].mixer.out_proj.weight.data[7] += 3


def change_one_column(model) -> None:
    model.layers[0].mixer.out_proj.weight.data[:, 40] *= -40


def change_one_value(model) -> None:
    with torch.no_grad():
        model.layers[1].mixer.out_proj.weight[7, 13] += 3


def load(model) -> None:
    model.load_state_dict(unit_gain_(small_model(dtype="float64"), seed=1).state_dict())


def replace(model) -> None:
    model.layers[0].mixer.v_proj.weight.data = model.layers[0].mixer.v_proj.weight.data.flip(0).clone()


def swap_module(model) -> None:
    old = model.layers[0].mixer.q_proj
    model.layers[0].mixer.q_proj = torch.nn.Linear(old.in_features, old.out_features, bias=False, dtype=torch.float64)


CHANGES = [merge, change_one_row, change_one_column, change_one_value, load, replace, swap_module]


def fresh(model, request: Request) -> list[int]:
    """The tokens of a new engine over the same weights."""
    return alone(model, request).tokens


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("told", [False, True])
def test_states_of_old_weights_are_not_used_after_a_change_in_place(change, told):
    model = small_model(dtype="float64")
    engine = engine_of(model, prefix_cache_bytes=10**6, prefix_interval=8)
    first = engine.submit(Request(prompt(33), 8, GREEDY, keep_state=True))
    engine.run()
    again = engine.submit(Request(prompt(33), 8, GREEDY))
    engine.run()
    assert again.cached == 32
    change(model)
    if told:
        engine.weights_changed()
    with pytest.raises(Refused, match="the snapshot is of another model"):
        engine.submit(Request([1], 5, GREEDY), first.snapshot)
    after = engine.submit(Request(prompt(33), 8, GREEDY, keep_state=True))
    engine.run()
    assert after.cached == 0
    assert after.tokens == fresh(model, after.request) != again.tokens
    cached = engine.submit(Request(prompt(33), 8, GREEDY))
    engine.run()
    assert (cached.cached, cached.tokens) == (32, after.tokens)
    assert engine.submit(Request([1], 5, GREEDY), after.snapshot) is not None
    engine.run()


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_requests_under_way_when_weights_change_keep_no_state(change):
    model = small_model(dtype="float64")
    engine = engine_of(model, prefix_cache_bytes=10**6, prefix_interval=8, num_slots=1)
    running = engine.submit(Request(prompt(33), 30, GREEDY, keep_state=True))
    waiting = engine.submit(Request(prompt(40, seed=3), 8, GREEDY))
    while len(running.tokens) < 3:
        engine.step()
    change(model)
    engine.weights_changed()
    assert (running.finish_reason, running.error) == ("failed", "the weights changed while it ran")
    engine.run()
    assert waiting.tokens == fresh(model, waiting.request)
    follow_up = engine.submit(Request(prompt(33) + running.tokens + [5], 8, GREEDY))
    engine.run()
    assert follow_up.cached == 0
    assert follow_up.tokens == fresh(model, follow_up.request)


def test_a_change_is_noticed_before_a_mixed_state_is_kept():
    model = small_model(dtype="float64")
    engine = engine_of(model, prefix_cache_bytes=10**6)
    running = engine.submit(Request(prompt(9), 12, GREEDY))
    while len(running.tokens) < 3:
        engine.step()
    merge(model)
    with pytest.raises(ValueError, match="the request is finished"):
        engine.snapshot(running)
    assert running.finish_reason == "failed"
    running = engine.submit(Request(prompt(9), 12, GREEDY))
    kept = engine.submit(Request(prompt(9), 12, GREEDY, keep_state=True))
    while len(kept.tokens) < 3:
        engine.step()
    change_one_value(model)
    engine.run()
    assert (kept.error, kept.snapshot) == ("the weights changed while it ran", None)
    follow_up = engine.submit(Request(prompt(9) + running.tokens + [5], 8, GREEDY))
    engine.run()
    assert follow_up.cached == 0
    assert follow_up.tokens == fresh(model, follow_up.request)


def test_a_model_in_training_or_moved_is_refused_until_it_is_back(small):
    engine = engine_of(small)
    generation = engine.submit(Request(prompt(5), 4, GREEDY))
    small.train()
    try:
        with pytest.raises(ValueError, match="training mode; accepted: evaluation mode"):
            engine.step()
    finally:
        small.eval()
    small.double()
    try:
        with pytest.raises(ValueError, match=r"the model is torch.float64.*accepted: torch.float32 on cpu"):
            engine.weights_changed()
    finally:
        small.float()
    engine.run()
    assert generation.finish_reason == "length"


@pytest.mark.parametrize("merging", ["merge_and_unload", "merge_adapter"])
def test_a_merged_adapter_is_noticed(merging):
    peft = pytest.importorskip("peft")
    model = hf_model("both decays")
    engine = Engine(model.model, num_slots=1, prompt_chunk=8, prefix_cache_bytes=10**6, prefix_interval=8)
    request = Request(prompt(25), 8, GREEDY, keep_state=True)
    before = engine.submit(request)
    engine.run()
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    adapted.eval()
    with torch.no_grad():
        wanted = adapted(torch.tensor([prompt(25)])).logits[0, -1].argmax()
    attached = engine.submit(request)
    engine.run()
    assert attached.cached == 0
    assert attached.tokens[0] == int(wanted)
    getattr(adapted, merging)()
    with pytest.raises(Refused, match="another model"):
        engine.submit(Request([1], 5, GREEDY), before.snapshot)
    merged = engine.submit(request)
    engine.run()
    assert merged.cached == 0
    assert merged.tokens == attached.tokens != before.tokens


class Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def forward(self, weight):
        return weight * self.scale


def switched(name: str):
    """A model, and a function that changes what it computes and no weight of it."""
    if name == "parametrization":
        model, scaled = small_model("both decays"), Scaled()
        parametrize.register_parametrization(model.layers[0].mixer.out_proj, "weight", scaled)
        return model, lambda: setattr(scaled, "scale", -3.0)
    peft = pytest.importorskip("peft")
    model = hf_model("both decays")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.add_adapter("other", config)
    adapted.eval()
    layer = model.model.layers[0].mixer.v_proj
    return model.model, {
        "disabled adapter": adapted.base_model.disable_adapter_layers,
        "other adapter": lambda: adapted.set_adapter("other"),
        "scaled adapter": lambda: layer.set_scale("default", -20),
    }[name]


@pytest.mark.parametrize("name", ["disabled adapter", "other adapter", "scaled adapter", "parametrization"])
def test_states_are_not_used_after_an_adapter_was_switched(name):
    model, switch = switched(name)
    engine = engine_of(model, prefix_cache_bytes=10**6, prefix_interval=8)
    request = Request(prompt(25), 8, GREEDY, keep_state=True)
    before = engine.submit(request)
    engine.run()
    switch()
    with pytest.raises(Refused, match="another model"):
        engine.submit(Request([1], 5, GREEDY), before.snapshot)
    after = engine.submit(request)
    engine.run()
    assert after.cached == 0
    assert after.tokens == fresh(model, request) != before.tokens
