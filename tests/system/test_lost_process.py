"""Errors of collectives whose other processes have ended, and errors of this process."""

from __future__ import annotations

import pytest
from torch.distributed import DistNetworkError

from retnet.system.lost_process import LostProcess, lost_process_named

CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:35545.")


@pytest.mark.parametrize("error", [CLOSED, DistNetworkError("the store is gone")])
def test_a_lost_process_is_one_message(error):
    with pytest.raises(LostProcess, match=r"process 3 has lost the connection .* own message$"), lost_process_named(3):
        raise error
    with pytest.raises(LostProcess), lost_process_named(3):
        raise OSError("checkpoint-4 could not be written") from error  # as a checkpoint says it


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError("no space left"), KeyError("x")])
def test_errors_of_this_process_pass_through(error):
    with pytest.raises(type(error)) as raised, lost_process_named(3):
        raise error
    assert raised.value is error
