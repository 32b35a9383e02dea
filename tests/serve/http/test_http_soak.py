"""Random clients of a server with real sockets, good and bad: every answer is right, and nothing is left of them."""

import pytest

from tests.serve.http.soak import soak

SECONDS = 60.0  # of each stack


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["retention", "hybrid"])
def test_random_clients_get_what_the_engine_gives_alone_and_leave_nothing(stack):
    counts = soak(SECONDS, stack, seed=0)
    compared = sum(count for what, count in counts.items() if what.startswith("compared"))
    assert compared > 100
    assert counts["too close to tell"] <= 2 + compared // 1000
    for what in ("left: close", "left: half-close", "garbage", "compared: chat, streamed", "with session"):
        assert counts[what], what
