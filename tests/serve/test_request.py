"""Everything that a caller hands over is checked and copied when it arrives, or refused with what is accepted."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from retnet.models.decode.sampling import Sampling
from retnet.models.snapshot import Snapshot
from retnet.serve.engine import Engine
from retnet.serve.request import Refused, Request
from retnet.serve.speculation import Speculation
from retnet.system import checks
from tests.small_models import HYENA, MAMBA2, NOPE, PAPER, small_model

from .odd_values import HUGE, INF, NAN, Raises, name_of, odd_values
from .test_engine import engine_of, text_of


def accepted(field: str, call: Callable[[Any], Any]) -> dict[str, Any]:
    """What `call` makes of each odd value that it accepts. It refuses the others by name, with what is accepted."""
    results, unclear = {}, []
    for name, value in odd_values().items():
        try:
            results[name] = call(value)
        except ValueError as error:
            message = str(error)
            if field not in message or "accepted" not in message or len(message) > 600:
                unclear.append((name, message))
    assert unclear == []
    return results


TOKENS = {
    "list [1]": [1], "list [1, 2, 3]": [1, 2, 3], "tuple (1, 2)": [1, 2], "range range(0, 3)": [0, 1, 2],
    "deque deque([1])": [1], "list [<Three.THREE: 3>]": [3], "array": [1, 2], "memoryview": [1, 2], "iterator": [1, 2],
    "generator": [1, 2], "map": [1, 2], "chain": [1, 2], "values": [2], "numpy": [1, 2], "numpy uint8": [1, 2],
    "tensor": [1, 2], "tensor int32": [1, 2], "tensor uint8": [1, 2],
    "list []": [], "tuple ()": [], "numpy empty": [], "tensor empty": [],
}  # fmt: skip
SETS = {"set set()": [], "set {1}": [1], "keys": [1]}
STRINGS = {
    "list ['a']": ["a"], "tuple ('x', 'y')": ["x", "y"], "set {'a'}": ["a"], "iterator of strings": ["ab", "c"],
    "numpy strings": ["a", "b"], "list ['\\ud800']": ["\ud800"],
    "list []": [], "tuple ()": [], "set set()": [], "numpy empty": [], "tensor empty": [],
}  # fmt: skip
SMALL = {"int 1": 1, "int 2": 2, "int 3": 3, "int 4": 4, "int 61": 61, "Three <Three.THREE: 3>": 3, "numpy integer": 3}
LARGE = {f"int {n!r}"[:28]: n for n in (2**31, 2**63, 2**64, HUGE)} | {"int without a repr": 10**5000}
UP_TO_FLOATS = {name: n for name, n in LARGE.items() if n < HUGE}
NUMBERS = {
    "int 0": 0,
    "float 0.0": 0,
    "float 0.5": 0.5,
    "Fraction Fraction(1, 2)": 0.5,
    "numpy float": 0.5,
    "int 1": 1,
    "float 1.0": 1,
}
MORE_NUMBERS = {name: n for name, n in SMALL.items() if n > 1}
NONE, ZERO = {"NoneType None": None}, {"int 0": 0}


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("prompt", TOKENS),
        ("max_new_tokens", SMALL | LARGE | ZERO | NONE | {"int -1": -1, f"int {-HUGE}"[:28]: -HUGE, "numpy int8": -1}),
        ("sampling", {"sampling": Sampling()}),
        ("stop_tokens", TOKENS | SETS),
        ("stop_strings", STRINGS),
        ("ignore_eos", {"bool True": True, "bool False": False}),
        ("shared", {name: n for name, n in SMALL.items() if n <= 3} | ZERO),
        ("keep_state", {"bool True": True, "bool False": False}),
        ("prompt_logprobs", {name: n for name, n in SMALL.items() if n <= 20} | ZERO | NONE),
        ("grammar", NONE),
        ("counted", TOKENS | SETS | NONE),
        ("prefix_group", {n: v for n, v in odd_values().items() if v is None or (isinstance(v, str) and len(v) < 257)}),
    ],
)  # fmt: skip
def test_a_request_takes_each_field_as_what_it_is_or_names_it(field, expected):
    values = accepted(field, lambda value: getattr(Request(**{"prompt": [1, 2, 3], field: value}), field))
    assert {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()} == expected


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("temperature", NUMBERS | MORE_NUMBERS),
        ("top_k", SMALL | LARGE | NONE),
        ("top_p", {name: p for name, p in NUMBERS.items() if p} | NONE),
        ("min_p", NUMBERS | NONE),
        ("repetition_penalty", {n: p for n, p in (NUMBERS | MORE_NUMBERS).items() if p}),
        ("presence_penalty", NUMBERS | MORE_NUMBERS | {"int -1": -1, "float -1.5": -1.5, "numpy int8": -1}),
        ("frequency_penalty", NUMBERS | MORE_NUMBERS | {"int -1": -1, "float -1.5": -1.5, "numpy int8": -1}),
        (
            "logit_bias",
            {
                "dict {}": {}, "dict {1: 2.0}": {1: 2}, "dict {1: 2}": {1: 2}, "dict {2: -inf}": {2: -INF},
                "Counter Counter({1: 1})": {1: 1},
                f"dict {{{2**70}: 1.0}}"[:29]: {2**70: 1}, "dict {-5: 1.0}": {-5: 1},
            },
        ),
        ("logprobs", {name: n for name, n in SMALL.items() if n <= 20} | ZERO | NONE),
        ("seed", SMALL | ZERO | NONE | {"int 2147483648": 2**31}),
    ],
)  # fmt: skip
def test_sampling_takes_each_field_as_what_it_is_or_names_it(field, expected):
    values = accepted(field, lambda value: getattr(Sampling(**{field: value}), field))
    assert values == expected
    exact = (int, float, dict, type(None))
    assert all(isinstance(value, exact) and not isinstance(value, bool) for value in values.values())


@pytest.mark.parametrize(("field", "expected"), [("draft_tokens", {3}), ("longest", {1, 2, 3, 4, 61})])
def test_speculation_takes_each_field_as_what_it_is_or_names_it(field, expected):
    values = accepted(field, lambda value: getattr(Speculation(**{field: value}), field))
    assert set(values.values()) == expected


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    engine = engine_of(small_model("hybrid"))
    generation = engine.submit(Request([1, 2, 3], 2, Sampling(temperature=0), keep_state=True))
    engine.run()
    return generation.snapshot


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("state", {}),
        ("tokens", {}),  # none has as many tokens as the state has read
        ("model", {name: v for name, v in odd_values().items() if isinstance(v, str)}),
        ("rounding_error", NUMBERS | MORE_NUMBERS | UP_TO_FLOATS | {"float inf": INF, "numpy longdouble": INF}),
        ("output_start", {name: n for name, n in SMALL.items() if n <= 5} | ZERO | NONE),
    ],
)  # fmt: skip
def test_a_snapshot_takes_each_field_as_what_it_is_or_names_it(snapshot, field, expected):
    values = accepted(field, lambda value: getattr(replace(snapshot, **{field: value}), field))
    assert values == expected


def test_the_tokens_of_a_snapshot_are_copied_and_a_state_that_was_moved_on_is_refused(snapshot):
    theirs = snapshot.tokens[:]
    mine = replace(snapshot, tokens=theirs)
    theirs.append(1)
    assert mine.tokens == snapshot.tokens
    mine.tokens.append(1)
    engine = engine_of(small_model("hybrid"))
    with pytest.raises(Refused, match="the snapshot was changed: state is at position"):
        engine.submit(Request([1], 3), mine)


def test_files_of_snapshots_are_named_by_paths(snapshot, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snapshot.save("file")
    assert set(accepted("dtype", lambda value: snapshot.save("file", value))) == set()

    def is_there(value: Any) -> bool | None:
        if isinstance(value, str) and len(value) > 200:
            return None  # the file system's own error
        try:
            return isinstance(Snapshot.load(value), Snapshot)
        except FileNotFoundError:
            return False

    found = {name for name, there in accepted("path", is_there).items() if there is not None}
    assert found == {name for name, v in odd_values().items() if isinstance(v, str) and 0 < len(v) < 200}
    assert accepted("device", lambda value: Snapshot.load("file", value)) == {}


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("model", set()),
        ("num_slots", {1, 4}),
        ("max_tokens", {*SMALL.values()}),
        ("prompt_chunk", {*SMALL.values(), *LARGE.values(), None}),
        ("prompt_budget", {*SMALL.values(), *LARGE.values(), None}),
        ("prefix_cache_bytes", {*SMALL.values(), *LARGE.values(), None}),
        ("prefix_interval", {4, *LARGE.values(), None}),
        ("max_waiting", {0, *SMALL.values(), *LARGE.values(), None}),
        ("deferred_writes", {0}),
        ("graphs", {None, False}),
    ],
)  # fmt: skip
def test_an_engine_takes_each_option_as_what_it_is_or_names_it(option, expected):
    model = small_model([PAPER, NOPE, MAMBA2])

    def make(value: Any) -> Any:
        options = {"num_slots": 1, "max_tokens": 20, "prompt_chunk": 4, "prompt_budget": 4, "prefix_cache_bytes": 10**6}
        return Engine(**({"model": model} | options | {option: value}))

    engines = accepted(option, make)
    values = odd_values()
    assert {values[name] if values[name] is None else int(values[name]) for name in engines} == expected
    for engine in engines.values():
        if engine.pool.max_tokens >= 8:
            served(engine)


def served(engine: Engine) -> None:
    """The engine serves a request, and then has all slots free."""
    generation = engine.submit(Request([1, 2, 3, 4, 5], 3, Sampling(temperature=0)))
    engine.run()
    assert (generation.finish_reason, generation.num_new) == ("length", 3)
    assert engine.pool.num_free == engine.pool.num_slots


def test_a_budget_in_memory_is_an_integer_that_a_slot_fits_into():
    model = small_model()
    assert accepted(
        "memory_bytes",
        lambda value: value if type(value) is int and value == 2**31 else Engine(model, memory_bytes=value),
    ) == {
        "int 2147483648": 2**31  # enough, and not taken by this test
    }
    served(Engine(model, memory_bytes=np.int64(10**6)))


def test_decode_and_speculation_are_what_they_say():
    model = small_model()
    assert set(accepted("decode", lambda value: Engine(model, num_slots=1, decode=value))) >= {"NoneType None"}
    taken = accepted("speculation", lambda value: Engine(model, num_slots=1, speculation=value))
    assert set(taken) == {"NoneType None", "speculation"}
    for engine in taken.values():
        served(engine)


class Wrapper(torch.nn.Module):
    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model


def test_a_model_that_cannot_be_served_is_refused_by_name():
    for model, message in (
        (Wrapper(small_model()), "model is of type Wrapper; accepted: a LanguageModel, here its `model`"),
        (small_model().train(), "training mode"),
        (small_model().to("meta"), "on device meta"),
        (small_model([HYENA]), "layer 0 is hyena"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(model, num_slots=1)


def test_calls_take_what_they_say_or_name_it(snapshot):
    engine = engine_of(small_model("hybrid"))
    ended = engine.submit(Request([1, 2], 2, keep_state=True))
    engine.run()
    assert set(accepted("request", engine.submit)) == {"request"}
    assert set(accepted("request", lambda value: next(engine.stream(value)))) == {"request"}
    assert set(accepted("request", lambda value: engine.fork(ended, value))) == {"request"}
    assert set(accepted("after", lambda value: engine.submit(Request([1], 3), value))) == {"NoneType None"}
    assert set(accepted("samplings", engine.warmup)) == {"parts"}
    for call in (engine.cancel, engine.snapshot, lambda value: engine.fork(value, Request([1], 3))):
        assert accepted("generation", call) == {}
    engine.run()
    served(engine)


class Changing:
    """Holders of values that the caller changes after they were handed over."""

    def __init__(self) -> None:
        self.prompt, self.stop_tokens, self.stop_strings, self.logit_bias = [1, 2, 3], [60], ["zz"], {5: 3.0}

    def request(self) -> Request:
        sampling = Sampling(temperature=0, logit_bias=self.logit_bias)
        return Request(self.prompt, 12, sampling, self.stop_tokens, self.stop_strings)

    def change(self) -> None:
        self.prompt[:] = ["x"]
        self.stop_tokens[:] = range(61)
        self.stop_strings[:] = [5, ""]
        self.logit_bias.update({-7: "a", 1: NAN})


def test_what_the_caller_changes_afterwards_changes_nothing(hybrid):
    expected = engine_of(hybrid, decode=text_of)
    plain = expected.submit(Changing().request())
    expected.run()
    for steps in (0, 1, 3):
        engine, theirs = engine_of(hybrid, decode=text_of), Changing()
        generation = engine.submit(theirs.request())
        for _ in range(steps):
            engine.step()
        theirs.change()
        engine.run()
        assert (generation.tokens, generation.text) == (plain.tokens, plain.text)
    for frozen in (plain.request, plain.request.sampling, Speculation(3)):
        with pytest.raises(AttributeError):
            frozen.seed = frozen.prompt = frozen.longest = 1  # type: ignore[misc] (frozen)
    with pytest.raises(TypeError, match="does not change"):
        plain.request.sampling.logit_bias[5] = 1.0  # type: ignore[index] (frozen)


def test_a_view_of_the_tokens_that_the_caller_holds_does_not_stop_the_engine(hybrid):
    engine = engine_of(hybrid)
    expected = engine.submit(Request([1, 2, 3], 8, Sampling(temperature=0)))
    engine.run()
    watched, other = (engine.submit(Request([1, 2, 3], 8, Sampling(temperature=0))) for _ in range(2))
    views = []
    while not engine.idle:
        engine.step()
        views.append(np.asarray(watched.seen))
    assert watched.tokens == other.tokens == expected.tokens
    assert all(list(view) == [1, 2, 3, *expected.tokens[: len(view) - 3]] for view in views)


def test_a_decode_function_may_do_what_it_likes_with_its_list(hybrid):
    def greedy(tokens: list[int]) -> str:
        text = text_of(tokens)
        tokens.clear()
        tokens += [7, 7, 7]
        return text

    texts = []
    for decode in (text_of, greedy):
        engine = engine_of(hybrid, decode=decode)
        generation = engine.submit(Request([1, 2, 3], 20, Sampling(temperature=0), stop_strings=["no such text"]))
        engine.run()
        texts.append(generation.text)
    assert texts[0] == texts[1]
    assert len(texts[0]) == 20


@pytest.mark.parametrize("wrong", [None, 5, b"text", ["t"], NAN, Raises(), object], ids=name_of)
def test_a_decode_function_that_returns_no_text_fails_its_request_alone(hybrid, wrong):
    engine = engine_of(hybrid, decode=lambda tokens: wrong)
    stopping = engine.submit(Request([1, 2], 5, stop_strings=["x"]))
    plain = engine.submit(Request([1, 2], 5))
    engine.run()
    assert (stopping.finish_reason, plain.finish_reason) == ("failed", "length")
    assert "its text cannot be decoded" in stopping.error
    assert engine.pool.num_free == engine.pool.num_slots


def test_math_infinite_values_of_a_request_are_served():
    engine = engine_of(small_model())
    sampling = Sampling(top_k=10**5000, seed=2**63 - 1, logit_bias=dict.fromkeys(range(60), -math.inf))
    generation = engine.submit(Request([1], 3, sampling))
    engine.run()
    assert generation.tokens == [60] * 3
    with pytest.raises(Refused, match="max_new_tokens a int"):
        engine_of(small_model()).submit(Request([1], 10**5000))


class SaysThree:
    """Says that it has three items, and has no end."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[int]:
        return itertools.repeat(1)


@pytest.mark.parametrize("field", ["prompt", "stop_tokens", "stop_strings"])
@pytest.mark.parametrize(
    "values",
    [itertools.repeat(1), itertools.count(), (1 for _ in itertools.count()), SaysThree(), range(10**12),
     torch.ones(1, dtype=torch.long).expand(10**12)],
    ids=["repeat", "count", "generator", "says three", "range", "tensor"],
)  # fmt: skip
def test_iterables_without_end_are_refused(field, values, monkeypatch):
    for limit in ("MOST_ITEMS", "MOST_ITEMS_OF_ITERATOR"):
        monkeypatch.setattr(checks, limit, 1000)
    with pytest.raises(Refused, match=f"{field} is .*of more than 1,000 items; accepted: "):
        Request(**{"prompt": [1], field: values})
