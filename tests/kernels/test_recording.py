"""Recorded passes: a replay does what the pass does, with the addresses of the tensors that it is given."""

import ctypes
import gc
import weakref
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton import knobs

from retnet.kernels import recording
from retnet.kernels.recording import Recordings, launch


class Scale:
    """A kernel that computes out = factor x for `n` float32 numbers, with the parts of Triton's that are used here."""

    arg_names = ("x", "out", "n", "factor", "BLOCK")

    def __init__(self, direct: bool):
        self.direct, self.through_triton = direct, 0

    def __getitem__(self, grid):
        def run(x, out, n, factor, BLOCK, num_warps=4):
            self.through_triton += 1
            assert (grid, BLOCK, num_warps) == ((3,), 16, 2)
            base, width = (x.base, x.shape[0]) if isinstance(x, Map) else (x, n)
            out.flatten()[:n] = factor * base.flatten()[:width]
            return SimpleNamespace(run=self, function=7, packed_metadata="packed") if self.direct else None

        return run

    launch_cooperative_grid, launch_pdl, global_scratch_size, profile_scratch_size = False, True, 0, 0

    def launch(self, *arguments):
        given = (3, 1, 1, 0, 7, False, True, None, None, "packed", None, None, None)
        assert arguments[: len(given)] == given
        x, out, n, factor, block = arguments[len(given) :]
        assert block == 16
        read, written = ((ctypes.c_float * n).from_address(address) for address in (x, out))
        for i in range(n):
            written[i] = factor * read[i]


@dataclass
class Map:
    """A TMA descriptor as `recording` sees it."""

    base: Tensor | None
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    padding: str = "zero"


@pytest.fixture(params=[True, False], ids=["direct", "through Triton"])
def kernel(request, monkeypatch) -> Scale:
    if request.param:
        monkeypatch.setattr(recording.triton, "__version__", "3.6.0")
    return Scale(request.param)


def scaled(kernel: Scale, x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """A pass with a temporary, a view that kernels alone read, one that is returned, zeros, and an update in place."""
    doubled = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(kernel, (3,), x, doubled, x.numel(), 2.0, BLOCK=16, num_warps=2)
    tail = doubled.flatten(0, 1)[1:]
    out = torch.zeros(x.shape[0], x.shape[1], x.shape[2], dtype=x.dtype)
    rows = out.view(-1, x.shape[2])
    launch(kernel, (3,), tail, rows[1:], tail.numel(), factor, BLOCK=16, num_warps=2)
    rows[0].add_(1)
    return out.transpose(0, 1), doubled.sum(0)


def expected(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    out = 2 * factor * x.clone()
    out.view(-1, x.shape[2])[0] = 1
    return out.transpose(0, 1), 2 * x.sum(0)


def test_replays_give_what_the_pass_gives_for_every_tensor(kernel):
    recordings = Recordings()
    for _ in range(6):
        x = torch.randn(2, 3, 5)
        found = recordings.run("kind", (x, None), lambda x=x: scaled(kernel, x, 3.0))
        for a, b in zip(found, expected(x, 3.0)):
            torch.testing.assert_close(a, b)
        assert found[0].stride() == (5, 15, 1)
    assert kernel.through_triton == (4 if kernel.direct else 12)  # two runs of two launches, then the replays'


def test_results_of_two_replays_share_no_memory_and_nothing_keeps_tensors_alive(kernel):
    recordings = Recordings()
    x = torch.randn(2, 3, 5)
    results = [recordings.run("kind", (x,), lambda x=x: scaled(kernel, x, 3.0)) for _ in range(4)]
    first, second, third, fourth = results
    third[0].zero_()
    assert torch.equal(fourth[0], first[0])
    assert torch.equal(fourth[1], second[1])
    alive = [weakref.ref(one) for one in (x, *first, *third)]
    del x, results, first, second, third, fourth
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)


def test_temporaries_are_freed_after_their_last_use(kernel):
    def chain(x: Tensor) -> tuple[Tensor]:
        a = torch.empty(x.shape)
        launch(kernel, (3,), x, a, 4, 2.0, BLOCK=16, num_warps=2)
        b = torch.empty(x.shape)
        launch(kernel, (3,), a, b, 4, 2.0, BLOCK=16, num_warps=2)
        c = torch.empty(x.shape)
        launch(kernel, (3,), b, c, 4, 2.0, BLOCK=16, num_warps=2)
        return (c,)

    recordings, x = Recordings(), torch.ones(4)
    for _ in range(2):
        recordings.run("kind", (x,), lambda: chain(x))
    steps = recordings._found["kind"]._steps
    assert [slots for _, slots in steps if slots] == [(1,), (2,)]  # x is 0; c, which is returned, is 3
    assert torch.equal(recordings.run("kind", (x,), lambda: chain(x))[0], 8 * x)


def test_descriptors_get_the_address_of_the_call(monkeypatch):
    monkeypatch.setattr(recording.triton, "__version__", "3.6.0")
    types = {"bfloat16": 1}
    monkeypatch.setattr(recording, "_map_arguments", lambda described, known: (known["swizzle"], types))
    made = []

    def fill(address, *rest):
        made.append(rest)
        return address

    utils = SimpleNamespace(fill_tma_descriptor=fill)
    monkeypatch.setattr(recording, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    kernel = Scale(direct=True)
    launcher = kernel.launch

    def without_shape(*arguments):
        *front, x, size, stride, out, n, factor, block = arguments
        assert (size, stride) == (4, 1)
        launcher(*front, x, out, n, factor, block)

    def wrapping(launcher, tensordesc_indices, tensordesc_meta):
        def inner(*arguments):
            return launcher(*arguments), tensordesc_indices, tensordesc_meta

        return inner

    known = [{"swizzle": 3, "fp4_padded": False}]
    kernel.launch = wrapping(without_shape, {0}, known)

    def one(x: Tensor) -> tuple[Tensor]:
        out = torch.empty(4)
        launch(kernel, (3,), Map(x, [4], [1], [2]), out, 4, 5.0, BLOCK=16, num_warps=2)
        return (out,)

    recordings = Recordings()
    for _ in range(4):
        x = torch.randn(4)
        torch.testing.assert_close(recordings.run("kind", (x,), lambda x=x: one(x))[0], 5 * x)
    assert made == [(3, types)] * 2
    assert kernel.through_triton == 2


OUTSIDE = torch.ones(2, 3, 5)


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(lambda x: (x + float(x.sum()),), id="reads a value"),
        pytest.param(lambda x: (x + OUTSIDE,), id="reads a tensor from elsewhere"),
        pytest.param(lambda x: (OUTSIDE * 1,), id="does not read its inputs"),
        pytest.param(lambda x: (torch.cat([x, OUTSIDE]),), id="in a list"),
    ],
)
def test_a_pass_that_depends_on_more_than_its_inputs_is_never_replayed(run):
    recordings, runs = Recordings(), 0
    for _ in range(4):
        x = torch.randn(2, 3, 5)

        def counted(x=x):
            nonlocal runs
            runs += 1
            return run(x)

        assert torch.equal(recordings.run("kind", (x,), counted)[0], run(x)[0])
    assert runs == 4


def test_a_pass_whose_inputs_are_one_tensor_is_not_recorded_and_may_be_replayed():
    recordings, runs = Recordings(), []

    def difference(x: Tensor, y: Tensor) -> tuple[Tensor]:
        def run() -> tuple[Tensor]:
            runs.append(1)
            return (x - y,)

        return recordings.run("kind", (x, y), run)[0]

    same = torch.randn(3)
    for _ in range(3):
        assert not difference(same, same).any()
    assert len(runs) == 3
    difference(torch.ones(3), torch.zeros(3))  # recorded
    assert difference(torch.ones(3), torch.zeros(3)).all()
    assert not difference(same, same).any()
    assert len(runs) == 4


def test_an_error_in_a_recorded_pass_leaves_no_recorder_behind():
    recordings, x = Recordings(), torch.ones(2)
    recordings.run("kind", (x,), lambda: (x * 2,))

    def broken() -> tuple[Tensor]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        recordings.run("kind", (x,), broken)
    assert not recording.is_recording()
    assert torch.equal(recordings.run("kind", (x,), lambda: (x * 2,))[0], 2 * x)
    assert torch.equal(recordings.run("kind", (x,), lambda: (x * 3,))[0], 2 * x)  # a replay


def test_the_oldest_kinds_are_forgotten(monkeypatch):
    monkeypatch.setattr(recording, "MOST_KINDS", 3)
    recordings = Recordings()
    x = torch.ones(2)
    for key in (0, 0, 1, 1, 2, 2, 3, 3):
        recordings.run(key, (x,), lambda key=key: (x + key,))
    assert list(recordings._found) == [1, 2, 3]
    assert torch.equal(recordings.run(0, (x,), lambda: (x - 1,))[0], x - 1)
    recordings.forget()
    assert torch.equal(recordings.run(3, (x,), lambda: (x - 1,))[0], x - 1)


def test_a_profiler_of_launches_sees_every_launch(kernel):
    recordings, x = Recordings(), torch.ones(2, 3, 5)
    for _ in range(3):
        recordings.run("kind", (x,), lambda: scaled(kernel, x, 3.0))
    before, hook = kernel.through_triton, lambda *_: None
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        recordings.run("kind", (x,), lambda: scaled(kernel, x, 3.0))
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert kernel.through_triton == before + 2
