"""Time from a request to its first token over HTTP: a stored session with a short message, beside its whole prompt.

    python benchmarks/bench_sessions.py --model retnet-125m --context 100000 --threads 2

A server with a folder for sessions reads a prompt of `context` tokens once, timed, and keeps the session. Then, each
several times and as the median: a new server on the same folder continues the session from its file (`from disk`), and
continues it again from memory (`from memory`). Both send a message of `message` tokens. The file is in the page cache,
as it was just written. Weights are random; only a preset's shapes matter. Client and server run in one process and
share its cores. `host_milliseconds` is the processor time of that process meanwhile, which other work on the machine
does not lengthen. `extra_bytes` is the size of the session's file.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
from runner import Point, arguments, report

from retnet.data.tokenizer import ByteTokenizer
from retnet.models.lm import LanguageModel
from retnet.models.presets import preset
from retnet.serve.engine import Engine
from retnet.serve.http.app import create_app
from retnet.serve.http.run import Server, bound_socket
from retnet.serve.http.service import Service
from retnet.serve.http.settings import Settings

DAY = 86_400.0


@contextmanager
def served(model: LanguageModel, folder: Path) -> Iterator[httpx.Client]:
    """A client of a new server on a free port. Prompts are token ids, so the tokenizer decodes only."""
    settings = Settings(state_dir=folder, quiet=True, timeout=DAY, max_body=2**30)
    tokenizer = ByteTokenizer()
    engine = Engine(model, num_slots=1, decode=tokenizer.decode)
    listener = bound_socket("127.0.0.1", 0)
    server = Server(create_app(Service(engine, tokenizer, "bench", settings)), settings)
    started = threading.Event()
    server.on_started = started.set
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    if not started.wait(60):
        raise RuntimeError("the server did not start")
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=DAY) as client:
            client.get("/health").raise_for_status()
            yield client
    finally:
        server.should_exit = True
        thread.join()


def first_token(client: httpx.Client, **fields: object) -> tuple[float, float, dict]:
    """Milliseconds to the first token of a streamed completion, by the clock and of processor time; its `session`."""
    body = {"max_tokens": 2, "temperature": 0, "logprobs": 0, "ignore_eos": True, "stream": True, **fields}
    begin, busy, session = time.perf_counter(), time.process_time(), {}
    taken = used = 0.0
    with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(response.read().decode())
        for line in response.iter_lines():
            if line.startswith("data: {"):
                if not taken:
                    taken, used = 1e3 * (time.perf_counter() - begin), 1e3 * (time.process_time() - busy)
                session = json.loads(line[6:]).get("session") or session
    return taken, used, session


def measured(options: argparse.Namespace, folder: Path) -> Iterator[Point]:
    model = LanguageModel(preset(options.model)).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(256, (options.context + options.message,), generator=generator).tolist()
    context, message = ids[: options.context], ids[options.context :]
    case = f"{options.model} {options.context} + {options.message}"
    with served(model, folder) as client:
        taken, busy, session = first_token(client, prompt=context, keep_session=True)
    [file] = folder.glob("sess_*")
    size = file.stat().st_size
    note = f"{options.context} tokens read"
    yield Point("sessions", case, "server", "whole prompt", taken, host_milliseconds=busy, note=note)
    times: dict[str, list[tuple[float, float]]] = {"from disk": [], "from memory": [], "message alone": []}
    for _ in range(options.repeats):
        with served(model, folder) as client:
            first_token(client, prompt=message)  # warms up the model, and reads no session
            for where, values in times.items():
                fields = {} if where == "message alone" else {"session_id": session["id"]}
                taken, busy, used = first_token(client, prompt=message, **fields)
                if fields and used["reused_tokens"] < options.context:
                    raise RuntimeError(f"the session was not continued: {used}")
                values.append((taken, busy))
    for where, values in times.items():
        taken, busy = (statistics.median(column) for column in zip(*values))
        yield Point("sessions", case, "server", where, taken, host_milliseconds=busy, extra_bytes=size)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="retnet-125m", help="a preset")
    parser.add_argument("--context", type=int, default=100_000, help="tokens of the stored session")
    parser.add_argument("--message", type=int, default=16, help="tokens of the new message")
    parser.add_argument("--repeats", type=int, default=5, help="new servers that continue the session")
    parser.add_argument("--threads", type=int, help="of torch")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="retnet-sessions-") as folder:
        report(measured(options, Path(folder)), options.csv)


if __name__ == "__main__":
    main()
