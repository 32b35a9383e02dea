"""A soak of the server: random clients in another process, and what is left of them when they have gone."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retnet.models import snapshot
from retnet.serve.http.sessions import store
from retnet.serve.http.settings import Settings
from tests.serve.http.server import LiveServer, live_server
from tests.serve.http.soak_reference import CHUNK, CONTEXT, SLOTS
from tests.serve.http.soak_wire import STALL_SECONDS

KEYS = ("a-key-of-the-first-caller", "a-key-of-the-second-caller")
ROOT = Path(__file__).resolve().parents[3]
REST_SECONDS = 30.0  # for the server to be at rest after a phase
# Bytes more, between the second phase and the last.
MOST_RSS, MOST_ALLOCATED, MOST_TRACED = 16 * 2**20, 4 * 2**20, 2**20
MOST_THREADS = 24  # those of the pools of files, grammars and the event loop
PREFIX_BYTES = 2**20
TREE_BYTES = 2**17  # tokens of earlier prompts, so few that they are full after the first phase
SETTINGS = Settings(max_body=2**16, max_upload=2**22, max_waiting=16, session_memory=2**20, session_disk=2**22)


@dataclass
class Rest:
    """A server at rest. allocated: bytes of malloc in use; files: its open files; left: files of its folders that no
    session needs."""

    rss: int
    allocated: int
    traced: int
    files: int
    threads: list[str]
    tasks: int
    left: list[str]


def not_ours() -> list[tracemalloc.Filter]:
    """Leaves out what grows in others' code: the table of names that pathlib has interned, which doubles at times, and
    three integers for each tensor that safetensors 0.8 reads from a file."""
    lines = Path(snapshot.__file__).read_text().splitlines()
    reads = [number for number, line in enumerate(lines, 1) if "file.get_tensor(" in line]
    assert reads
    names = tracemalloc.Filter(False, pathlib.__file__)
    return [names, *(tracemalloc.Filter(False, snapshot.__file__, lineno) for lineno in reads)]


def soak(seconds: float, stack: str, seed: int, say: Callable[[str], None] = lambda _: None) -> dict[str, int]:
    """Let clients loose on a server for so long, in four phases; returns how often what happened.

    Raises AssertionError for a wrong answer and for what a phase leaves behind.
    """
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder, "keys")
        keys.touch(0o600)
        keys.write_text("\n".join(f"caller{i}:{key}" for i, key in enumerate(KEYS)))
        settings = replace(SETTINGS, api_key_file=keys, state_dir=Path(folder, "states"))
        options = {"num_slots": SLOTS, "max_tokens": CONTEXT, "prompt_chunk": CHUNK}
        remembered = store.MOST_REMEMBERED
        store.MOST_REMEMBERED = 200  # ids of ended sessions, which take megabytes until they are forgotten
        tracemalloc.start()
        try:
            with live_server(settings, stack=stack, prefix_cache_bytes=PREFIX_BYTES, **options) as live:
                assert live.service.engine.prefixes is not None
                live.service.engine.prefixes.tree_bytes = TREE_BYTES
                live.server._connections.limits |= dict.fromkeys(("head", "stall", "half"), STALL_SECONDS)
                return _phases(live, seconds, stack, seed, say)
        finally:
            tracemalloc.stop()
            store.MOST_REMEMBERED = remembered


def _phases(live: LiveServer, seconds: float, stack: str, seed: int, say: Callable[[str], None]) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.serve.http.soak_client", str(live.port), stack, str(seed), *KEYS]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as clients:
        assert clients.stdin is not None
        assert clients.stdout is not None
        rests, counts, snapshots = [], {}, []
        for phase in range(4):
            clients.stdin.write(f"{seconds / 4}\n")
            clients.stdin.flush()
            line = clients.stdout.readline()
            assert line, "the clients ended by an error"
            counts = json.loads(line)
            rests.append(at_rest(live))
            snapshots = [*snapshots[-1:], tracemalloc.take_snapshot()] if phase in (1, 3) else snapshots
            rest = rests[-1]
            say(
                f"phase {phase + 1}: {sum(counts.values())} events, RSS {rest.rss / 2**20:.1f} MiB, "
                f"allocated {rest.allocated / 2**20:.2f} MiB, "
                f"traced {rest.traced / 2**20:.2f} MiB, {rest.files} files, {len(rest.threads)} threads, "
                f"{rest.tasks} tasks"
            )
        clients.stdin.close()
    say("\n".join(f"{count:8} {what}" for what, count in sorted(counts.items())))
    first, last = rests[1], rests[-1]  # the first phase warms up
    before, after = (each.filter_traces(not_ours()) for each in snapshots)
    grown = after.compare_to(before, "lineno")
    traced, growth = sum(line.size_diff for line in grown), "\n".join(map(str, grown[:12]))
    assert traced < MOST_TRACED, f"{traced} bytes more:\n{growth}"
    assert last.allocated - first.allocated < MOST_ALLOCATED, f"{last.allocated - first.allocated} bytes more"
    assert last.rss - first.rss < MOST_RSS, f"{last.rss - first.rss} bytes more:\n{growth}"
    assert (last.files, last.tasks) == (first.files, first.tasks), f"{first} -> {last}"
    assert pools(last.threads) <= pools(first.threads), f"{first.threads} -> {last.threads}"
    assert len(last.threads) <= MOST_THREADS, last.threads
    assert last.left == [], last.left
    say(
        f"growth from the second phase to the last: RSS {(last.rss - first.rss) / 2**20:.1f} MiB, traced "
        f"{traced / 2**10:.0f} KiB, most of it:\n{growth}"
    )
    return counts


def at_rest(live: LiveServer) -> Rest:
    """Wait until nothing runs, check the counts of engine and service, and look at what there is."""
    service, server = live.service, live.server
    end = time.monotonic() + REST_SECONDS

    def busy() -> list[str]:
        stats = service.engine.stats()
        found = {
            "streams": service.num_streams, "exchanges": service.num_exchanges, "running": stats.running,
            "reading": stats.reading, "waiting": stats.waiting, "unread": stats.unread_tokens,
            "taken slots": stats.num_slots - service.engine.pool.num_free,
            "connections": len(server.server_state.connections), "tasks of uvicorn": len(server.server_state.tasks),
        }  # fmt: skip
        return [f"{count} {what}" for what, count in found.items() if count]

    while busy() and time.monotonic() < end:
        time.sleep(0.1)
    assert not busy(), f"after {REST_SECONDS:g} s there are still {busy()}"
    assert service.failure is None
    assert (len(service._queued), len(service._held), service._commands.qsize()) == (0, 0, 0)
    prefix = service.engine.prefixes
    assert prefix is not None
    assert prefix.counts.state_bytes <= PREFIX_BYTES
    state_dir = service.settings.state_dir
    assert state_dir is not None
    gc.collect()
    loop = next(iter(service._mailboxes))
    tasks = asyncio.run_coroutine_threadsafe(_num_tasks(), loop).result(30)
    left = [str(path) for path in state_dir.rglob("*") if path.is_file() and path.name not in ("secret", ".lock")]
    allocated = allocated_bytes()
    rss = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return Rest(
        rss,
        allocated,
        tracemalloc.get_traced_memory()[0],
        len(os.listdir("/proc/self/fd")),
        sorted({t.name for t in threading.enumerate()}),
        tasks,
        left,
    )


class _Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
        )
    ]  # fmt: skip


def allocated_bytes() -> int:
    """Bytes that the process holds through malloc, in all of its arenas, after those that are free are given back."""
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    libc.mallinfo2.restype = _Mallinfo
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd


def pools(threads: list[str]) -> set[str]:
    """The names of threads without their numbers."""
    return {name.rstrip("0123456789") for name in threads}


async def _num_tasks() -> int:
    return len(asyncio.all_tasks())
