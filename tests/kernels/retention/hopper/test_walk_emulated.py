"""Walks, emulated on the CPU, against the float64 oracle: at most twice the error of plain retention in bfloat16.

The small kernels beside them run in Triton's interpreter. What only the device can show is in `test_walk.py`.
"""

import os

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 and no GPU", allow_module_level=True)

from retnet.kernels.retention.hopper import passes as walk
from retnet.kernels.retention.problem import RetentionProblem

from . import emulator
from .test_walk import allowed, by_walks, error, make, plain

slow = pytest.mark.slow
CASES = [  # B, T, H, K, V, extras, processors of the device
    (1, 150, 1, 64, 64, "state", 1),
    (1, 150, 1, 64, 64, "token state mask", 1),
    pytest.param(1, 1300, 1, 64, 64, "state", 8, marks=slow),  # in parts
    pytest.param(1, 330, 2, 64, 128, "packed", 1, marks=slow),
    pytest.param(2, 330, 2, 128, 128, "state mask", 1, marks=slow),
    pytest.param(1, 400, 1, 256, 512, "state", 1, marks=slow),
    pytest.param(1, 400, 1, 256, 512, "token state", 1, marks=slow),
    pytest.param(1, 400, 1, 256, 512, "token state", 8, marks=slow),  # narrow tiles
    pytest.param(1, 1300, 1, 64, 64, "token state", 8, marks=slow),
    pytest.param(1, 330, 2, 64, 128, "token packed mask", 1, marks=slow),
    pytest.param(1, 457, 3, 128, 64, "token extreme", 1, marks=slow),
    pytest.param(1, 64, 2, 64, 64, "token", 1, marks=slow),
    pytest.param(1, 200, 4, 128, 64, "token state groups", 1, marks=slow),
    pytest.param(1, 1100, 2, 64, 128, "groups", 8, marks=slow),
    pytest.param(1, 1, 3, 64, 64, "token state", 1, marks=slow),
]


@pytest.fixture
def emulate(monkeypatch):
    """emulate(processors): from then on walks are emulated, spread over as many processors."""
    monkeypatch.setattr(walk, "launch_walk", emulator.launch_walk)

    def on(processors):
        walk._partition.cache_clear()
        monkeypatch.setattr(walk, "multiprocessors", lambda device: processors)

    yield on
    walk._partition.cache_clear()


@pytest.mark.parametrize(("B", "T", "H", "K", "V", "extras", "processors"), CASES)
def test_errors_are_at_most_twice_those_of_plain_retention(B, T, H, K, V, extras, processors, emulate):
    emulate(processors)
    inputs = make(B, T, H, K, V, extras, device="cpu")
    q, k, v, dout, log_decay, state, dfinal, mask, cu = inputs
    problem = RetentionProblem(q, k, v, log_decay, K**-0.5, state, mask, cu)
    wanted = {"need_dstate": state is not None, "need_dlog_decay": problem.per_token}
    results = by_walks(problem, dout, dfinal, None if cu is not None else torch.float32, wanted)
    assert {"out", "dq", "dk", "dv"} <= results.keys()
    assert ("dlog_decay" in results) == ("token" in extras)
    assert results["dq"].shape == q.shape
    exact, low = plain(torch.float64, *inputs), plain(q.dtype, *inputs)
    for name, x in results.items():
        assert error(x, exact[name]) <= allowed(low[name], exact[name]), name


@slow
@pytest.mark.parametrize("extras", ["token", ""])
def test_heads_that_share_queries_and_keys_read_their_group(extras, emulate):
    emulate(1)
    q, k, v, _, log_decay, _, _, _, _ = make(1, 200, 4, 128, 64, f"groups {extras}", device="cpu")
    together = walk.walk_forward(RetentionProblem(q, k, v, log_decay, 1.0), torch.float32)
    expanded = (x.repeat_interleave(2, 2) for x in (q, k))
    apart = walk.walk_forward(RetentionProblem(*expanded, v, log_decay, 1.0), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(together, apart))


@slow
def test_documents_with_decays_per_token_do_not_see_their_neighbours(emulate):
    emulate(1)
    inputs = list(make(1, 200, 1, 64, 64, "token", device="cpu"))
    cu = torch.tensor([0, 70, 130, 200])

    def run():
        q, k, v, dout, log_decay, *_ = inputs
        problem = RetentionProblem(q, k, v, log_decay, 1.0, None, None, cu)
        return by_walks(problem, dout, None, None, {"need_dstate": False, "need_dlog_decay": True})

    before = run()
    for i in range(4):
        inputs[i] = inputs[i].clone()
        inputs[i][:, 129] += 1
    after = run()
    for name in ("out", "dq", "dk", "dv", "dlog_decay"):
        changed = (before[name] != after[name]).flatten(2).any(-1)[0].nonzero()[:, 0]
        assert 70 <= changed.min() <= changed.max() < 130, name
