"""Values of every kind to hand over where others are expected."""

import decimal
import enum
import fractions
import itertools
from array import array
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from retnet.models.decode.sampling import Sampling, SamplingParts
from retnet.serve.request import Request
from retnet.serve.speculation import Speculation

HUGE, NAN, INF = 10**400, float("nan"), float("inf")


class Three(enum.IntEnum):
    THREE = 3


class Raises:
    """Raises at whatever is asked of it."""

    def _raise(self, *_: object) -> Any:
        raise OSError("the caller's own error")

    __len__ = __iter__ = __bool__ = __eq__ = __repr__ = __float__ = __index__ = _raise
    __hash__ = object.__hash__


class RaisingMapping(dict):
    def items(self) -> Any:
        raise OSError("the caller's own error")

    __iter__ = keys = values = items


def raising_after_one() -> Iterable[int]:
    yield 1
    raise OSError("the caller's own error")


def odd_values() -> dict[str, Any]:
    """The values by name; iterators are new each time."""
    values = [
        None, True, False, 0, 1, 2, 3, 4, -1, 61, 2**31, 2**63, 2**64, HUGE, -HUGE, 10**5000, 0.0, 0.5, 1.0, -1.5,
        NAN, INF, -INF, 1j,
        "", "a", "12", b"", b"ab", b"\1\0\0\0", bytearray(b"ab"), [], [1], [1, 2, 3], ["a"], ["ab", b"c"], [""],
        [[1]], [1, [2]], [1.0],
        [None], [True], [-1], [2**31], [HUGE], [NAN], (), (1, 2), ("x", "y"), {}, {1: 2.0}, {1: 2}, {2: -INF},
        {"a": 1}, {1: "a"},
        {1.5: 1}, {1: None}, {1: NAN}, {1: INF}, {1: HUGE}, {True: 1.0}, {1: True}, {1: (1, 2)}, {2**70: 1.0},
        {-5: 1.0}, set(), {1},
        {"a"}, range(3), range(-2, 1), int, len, object(), ..., deque([1]), Counter([1]), decimal.Decimal("0.5"),
        fractions.Fraction(1, 2), fractions.Fraction(HUGE, 3), Three.THREE, [Three.THREE], ["\ud800"], slice(1, 2),
        Exception("x"),
        "a" * 10**5, Raises(), [Raises()], {1: Raises()}, {Raises(): 1.0}, RaisingMapping({1: 1.0}),
    ]  # fmt: skip
    named = {f"{type(v).__name__} {name_of(v)}": v for v in values}
    integers = torch.tensor([1, 2])
    return named | {
        "array": array("i", [1, 2]), "array of floats": array("d", [1, 2]),
        "memoryview": memoryview(array("i", [1, 2])),
        "iterator": iter([1, 2]), "generator": (i for i in (1, 2)), "map": map(int, "12"),
        "chain": itertools.chain([1], [2]),
        "keys": {1: 2}.keys(), "values": {1: 2}.values(), "pairs": {1: 2}.items(), "zip": zip([1], [2]),
        "iterator of strings": iter(["ab", "c"]), "raising generator": raising_after_one(),
        "numpy": np.array([1, 2]), "numpy uint8": np.array([1, 2], np.uint8), "numpy 2-D": np.array([[1, 2]]),
        "numpy floats": np.array([1.0, 2.0]), "numpy 0-d": np.array(3), "numpy empty": np.array([], int),
        "numpy bools": np.array([True]), "numpy strings": np.array(["a", "b"]),
        "numpy objects": np.array([1, "a", None], object),
        "numpy uint64": np.array([2**64 - 1], np.uint64), "numpy masked": np.ma.array([1, 2], mask=[0, 1]),
        "numpy integer": np.int64(3), "numpy int8": np.int8(-1), "numpy float": np.float32(0.5),
        "numpy nan": np.float64(NAN),
        "numpy bool": np.bool_(True), "numpy string": np.str_("a"), "numpy longdouble": np.longdouble("1e4000"),
        "tensor": integers, "tensor int32": integers.int(), "tensor uint8": integers.byte(),
        "tensor 2-D": integers[None],
        "tensor 0-d": torch.tensor(3), "tensor 0-d float": torch.tensor(0.5), "tensor floats": torch.tensor([1.0, 2.0]),
        "tensor empty": torch.tensor([], dtype=torch.long), "tensor bools": torch.tensor([True]),
        "tensor complex": torch.tensor([1j]),
        "tensor meta": integers.to("meta"), "tensor sparse": integers.to_sparse(),
        "tensor grad": torch.ones(2, requires_grad=True),
        "module": torch.nn.Linear(1, 1), "dtype": torch.long,
        "request": Request([1], 3), "sampling": Sampling(), "speculation": Speculation(3), "parts": SamplingParts(),
    }  # fmt: skip


def name_of(value: Any) -> str:
    try:
        return repr(value)[:24]
    except (OSError, ValueError):
        return "without a repr"
