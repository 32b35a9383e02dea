"""A server under load, beside its bare engine: throughput, time to the first token, time per token, load that is shed.

    python benchmarks/bench_serve.py --model retnet-1.3b --dtype bfloat16 --slots 64 --streams 1 16 64 256
    python benchmarks/bench_serve.py --model retnet-tiny --slots 4 --streams 1 4 16 --seconds 5    CPU
    python benchmarks/bench_serve.py --url http://127.0.0.1:8000 --name MODEL --streams 1 16 64    any such server
    python benchmarks/bench_serve.py --rival retnet-1.3b --streams 1 16 64    transformers' server, a Llama of that size

Each stream asks again as soon as its answer is whole. Clients are other processes; the engine and the server run one
after the other. A point counts the tokens of `seconds` after a warm-up of a quarter of that time. Weights and prompts
are random. Rows: `token` is the time per token of all streams together, `token of a stream` that between the tokens of
one, `event loop` the processor time of the server's HTTP thread per token. With `--overload N`, N times as many streams
as slots are let loose on a server whose queue takes as many requests as it has slots: `note` says how many requests
were refused, and the next point is a single stream after it.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rivals import LLAMAS, write_llama, write_tokenizer
from runner import Point, arguments, report
from serve_client import Seen

from retnet.stack.resolve import model_label

if TYPE_CHECKING:
    from retnet import Engine

START_SECONDS = 300.0
TICKS = os.sysconf("SC_CLK_TCK")


def under_load(address: tuple[str, int], job: dict, streams: int, clients: int, warm: float) -> Seen:
    """Let streams loose on a server. Returns what they saw in the window, which begins after `warm` seconds."""
    script = str(Path(__file__).with_name("serve_client.py"))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, script], **pipes) for _ in range(min(clients, streams))]
    for i, process in enumerate(processes):
        share = {"host": address[0], "port": address[1], "streams": list(range(i, streams, len(processes)))}
        process.stdin.write(json.dumps(job | share) + "\n")
        process.stdin.flush()
    for process in processes:
        process.stdout.readline()
    begin, total = time.time() + warm, Seen()
    for process in processes:
        process.stdin.write(f"{begin}\n")
        process.stdin.close()
    for process in processes:
        found = json.loads(process.stdout.read())
        total.tokens += found["tokens"]
        total.first += found["first"]
        total.gaps += found["gaps"]
        total.statuses.update({int(status): count for status, count in found["statuses"].items()})
        process.wait()
    return total


@contextmanager
def saved(options: argparse.Namespace) -> Iterator[None]:
    """Make `options.model` a directory, with random weights where it names a preset or a stack."""
    import retnet
    from retnet.models.directory import save_model

    if Path(options.model).is_dir():
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / options.name
        model = retnet.load(options.model, options.device, options.dtype)
        save_model(model, directory)
        write_tokenizer(directory, model.config.vocab_size)
        options.model = str(directory)
        del model
        yield


def bare_engine(options: argparse.Namespace, results: "multiprocessing.Queue") -> None:
    """The same loads on an engine in its own process; puts tokens per second of each number of streams."""
    import torch

    import retnet
    from retnet.serve.engine import Engine

    torch.set_num_threads(options.threads)
    model = retnet.load(options.model, options.device, options.dtype)
    for streams in options.streams:
        engine = Engine(model, num_slots=options.slots, deferred_writes=options.deferred_writes)
        engine.warmup()
        results.put(bare_rate(options, engine, streams))


def bare_rate(options: argparse.Namespace, engine: "Engine", streams: int) -> float:
    """Tokens per second of an engine that no server is before."""
    from retnet.models.decode.sampling import Sampling
    from retnet.serve.request import Request

    generator = random.Random(0)

    def submit() -> None:
        prompt = [generator.randrange(options.vocab_size) for _ in range(options.prompt)]
        engine.submit(Request(prompt, options.tokens, Sampling(temperature=0), ignore_eos=True))

    for _ in range(streams):
        submit()
    begin, tokens = time.perf_counter() + options.seconds / 4, 0
    while (now := time.perf_counter()) < begin + options.seconds:
        new = engine.step()
        if now >= begin:
            tokens += sum(len(some) for _, some in new)
        for generation, _ in new:
            if generation.finished:
                submit()
    return tokens / options.seconds


def engine_rates(options: argparse.Namespace) -> Iterator[tuple[int, float]]:
    """(streams, tokens per second) of the bare engine."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=bare_engine, args=(options, results))
    process.start()
    for streams in options.streams:
        yield streams, results.get(timeout=START_SECONDS + 2 * options.seconds)
    process.join()


@contextmanager
def server(options: argparse.Namespace, *more: object) -> Iterator[tuple[tuple[str, int], int]]:
    """`retnet serve` in another process: its address and process id."""
    words = ["-m", "retnet.cli", "serve", options.model, "--slots", options.slots, "--device", options.device]
    words += ["--quiet", "--deferred-writes", options.deferred_writes, "--prefix-cache", 0, *more]
    if options.dtype:
        words += ["--dtype", options.dtype]
    with started(words, "/ready", options.threads) as found:
        yield found


@contextmanager
def rival_server(options: argparse.Namespace) -> Iterator[tuple[tuple[str, int], int]]:
    """`transformers serve` with continuous batching and a random Llama of a preset's size."""
    with tempfile.TemporaryDirectory() as folder:
        write_llama(options.rival, Path(folder), options.prompt + options.tokens)
        options.name = folder
        words = ["-m", "transformers.cli.transformers", "serve", folder, "--continuous-batching", "--dtype", "bfloat16"]
        with started(words, "/health", options.threads) as ((host, port), pid):
            body = {"model": folder, "prompt": "w1 w2", "max_tokens": 8}  # it makes its cache at the first request
            asked = urllib.request.Request(
                f"http://{host}:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            urllib.request.urlopen(asked, timeout=START_SECONDS).close()
            yield (host, port), pid


@contextmanager
def started(words: list, ready: str, threads: int) -> Iterator[tuple[tuple[str, int], int]]:
    """A server's address and process id, once it answers at the path `ready`. words: Python's, all but the port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen([sys.executable, *map(str, words), "--port", str(port)], env=environment)
    try:
        wait_until_ready(("127.0.0.1", port), ready, process)
        yield ("127.0.0.1", port), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wait_until_ready(address: tuple[str, int], path: str, process: subprocess.Popen) -> None:
    begin = time.monotonic()
    while time.monotonic() - begin < START_SECONDS:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with code {process.returncode} before it was ready")
        try:
            urllib.request.urlopen(f"http://{address[0]}:{address[1]}{path}", timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"the server was not ready after {START_SECONDS:.0f} s")


def loop_seconds(pid: int) -> float:
    """Processor time of a process's first thread so far: the event loop of a server."""
    fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def load_name(options: argparse.Namespace, streams: int) -> str:
    if options.rival is not None:
        return f"Llama like {options.rival} {streams} streams {options.prompt} + {options.tokens}"
    return f"{options.name} {options.slots} slots {streams} streams {options.prompt} + {options.tokens}"


def measured(
    options: argparse.Namespace, address: tuple[str, int], pid: int | None, streams: int, bare: float | None
) -> Iterator[Point]:
    """The points of one number of streams. bare: tokens per second of the engine under the same load."""
    load = {
        "model": options.name, "prompt": options.prompt, "tokens": options.tokens, "vocab_size": options.vocab_size,
        "seconds": options.seconds, "words": options.rival is not None,
    }  # fmt: skip
    warm = options.seconds / 4
    before = None if pid is None else loop_seconds(pid)
    seen = under_load(address, {"load": load}, streams, options.clients, warm)
    busy = None if before is None or pid is None else loop_seconds(pid) - before
    case = load_name(options, streams)
    rate = seen.tokens / options.seconds
    refused = sum(count for status, count in seen.statuses.items() if status != 200)
    others = f", {refused} refused of {seen.statuses.total()}" if refused else ""
    floor = None if bare is None else 1e3 / bare

    def point(what: str, seconds: float, note: str = "", floor: float | None = None) -> Point:
        implementation = "http" if options.rival is None else "transformers"
        return Point("serve", case, implementation, what, 1e3 * seconds, floor, note=note)

    if not seen.gaps:
        raise RuntimeError(f"no stream got two tokens in the window: {dict(seen.statuses)}")
    yield point("token", 1 / rate, f"{rate:.0f} tokens/s{others}", floor)
    for what, times in (("first token", seen.first or [float("nan")]), ("token of a stream", seen.gaps)):
        yield point(f"{what} p50", statistics.median(times))
        yield point(f"{what} p99", sorted(times)[int(0.99 * (len(times) - 1))])
    if busy is not None:
        # Its clock runs during the warm-up as well, at about the same rate of tokens.
        yield point("event loop", busy / (rate * (warm + options.seconds)))


def main() -> None:
    parser = arguments(__doc__, csv="out/bench_serve.csv")
    parser.add_argument("--model", default="retnet-125m", help="preset, stack file or saved directory")
    parser.add_argument("--url", default=None, help="a server that runs already, in place of our own")
    parser.add_argument(
        "--rival", choices=sorted(LLAMAS), help="measure transformers' server with a Llama of this size"
    )
    parser.add_argument("--name", default=None, help="the model's name there")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="of the engine on a CPU")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--deferred-writes", type=int, default=0)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--prompt", type=int, default=128, help="tokens per prompt")
    parser.add_argument("--vocab-size", type=int, default=256, help="tokens of the prompts are below it")
    parser.add_argument("--tokens", type=int, default=256, help="new tokens per request")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each point")
    parser.add_argument("--clients", type=int, default=4, help="processes that the streams are spread over")
    parser.add_argument("--overload", type=int, default=0, help="a point with this many times as many streams as slots")
    options = parser.parse_args()
    if options.rival is not None:
        with rival_server(options) as (address, pid):
            for streams in options.streams:
                report(measured(options, address, pid, streams, None), options.csv)
        return
    options.name = options.name or model_label(options.model)
    if options.url is not None:
        parts = urlsplit(options.url)
        for streams in options.streams:
            address = (parts.hostname or "127.0.0.1", parts.port or 80)
            report(measured(options, address, None, streams, None), options.csv)
        return
    with saved(options):
        own_server(options)


def own_server(options: argparse.Namespace) -> None:
    bare = {}
    for streams, rate in engine_rates(options):
        bare[streams] = rate
        point = Point("serve", load_name(options, streams), "engine", "token", 1e3 / rate, note=f"{rate:.0f} tokens/s")
        report([point], options.csv)
    with server(options, "--max-waiting", max(options.streams)) as (address, pid):
        for streams in options.streams:
            report(measured(options, address, pid, streams, bare[streams]), options.csv)
    if options.overload:
        with server(options, "--max-waiting", options.slots) as (address, pid):
            report(measured(options, address, pid, options.overload * options.slots, None), options.csv)
            report(measured(options, address, pid, 1, bare.get(1)), options.csv)


if __name__ == "__main__":
    main()
