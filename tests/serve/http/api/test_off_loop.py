"""Long work leaves the event loop."""

import asyncio
import threading

from retnet.serve.http.api.off_loop import LONG, off_loop


def test_work_of_a_large_size_runs_in_another_thread():
    here = threading.get_ident()
    assert asyncio.run(off_loop(LONG - 1, threading.get_ident)) == here
    assert asyncio.run(off_loop(LONG, threading.get_ident)) != here
