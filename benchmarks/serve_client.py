"""A client of `bench_serve.py` in a process of its own: streams that ask again as soon as their answer is whole.

    python benchmarks/serve_client.py < JOB

JOB is one line of JSON: the fields of `Load`, the address, and the numbers of the streams. The process prints `ready`,
reads the window's begin (`time.time()`) from a second line, and prints what it saw in the window as JSON. Standard
library only, so that it starts at once.
"""

import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

USAGE = re.compile(rb'"completion_tokens": ?(\d+)')


@dataclass
class Seen:
    """What the streams of one client, or of all, saw in the measured window. Times are in seconds."""

    tokens: int = 0
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)  # between the tokens of one stream
    statuses: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True)
class Load:
    """prompt: tokens per prompt; tokens: new tokens per request; seconds: of the window, which begins at `begin`.

    words: prompts are words of `rivals.write_llama`'s tokenizer, and the request has OpenAI's fields alone.
    """

    model: str
    prompt: int
    tokens: int
    vocab_size: int
    seconds: float
    begin: float = 0.0
    words: bool = False

    def body(self, generator: random.Random) -> dict:
        prompt = [generator.randrange(self.vocab_size) for _ in range(self.prompt)]
        body = {"model": self.model, "max_tokens": self.tokens, "temperature": 0, "stream": True}
        if self.words:
            return body | {"prompt": " ".join(f"w{token}" for token in prompt)}
        usage = {"include_usage": True, "continuous_usage_stats": True}
        return body | {"prompt": prompt, "ignore_eos": True, "stream_options": usage}

    def measures(self, now: float) -> bool:
        return self.begin <= now < self.begin + self.seconds


def tokens_so_far(event: bytes, before: int) -> int:
    """New tokens of the response up to an event: what its usage says, otherwise one more per text."""
    if found := USAGE.search(event):
        return int(found[1])
    return before + (b'"text":"' in event and b'"text":""' not in event)


async def ask(address: tuple[str, int], body: dict, load: Load, seen: Seen) -> int:
    """One streamed completion over a connection of its own. Returns the HTTP status."""
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection(*address)
    try:
        begin = last = time.time()
        writer.write(head.encode() + f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
        status = int((await reader.readline()).split()[1])
        count = 0
        while line := await reader.readline():
            new = tokens_so_far(line, count) - count
            if not new:
                continue
            now = time.time()
            if load.measures(now):
                seen.tokens += new
                (seen.gaps if count else seen.first).append(now - (last if count else begin))
            last = now
            count += new
        return status
    finally:
        writer.close()


async def stream(address: tuple[str, int], load: Load, seen: Seen, seed: int) -> None:
    generator = random.Random(seed)
    while True:
        status = await ask(address, load.body(generator), load, seen)
        seen.statuses[status] += 1
        if status != 200:
            await asyncio.sleep(0.2)


async def run(address: tuple[str, int], load: Load, streams: Sequence[int]) -> Seen:
    """What the streams saw; they end with the window."""
    seen = Seen()
    tasks = [asyncio.create_task(stream(address, load, seen, i)) for i in streams]
    done, running = await asyncio.wait(tasks, timeout=load.begin + load.seconds - time.time())
    for task in done:
        task.result()  # a stream ends by an error alone
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    return seen


def main() -> None:
    job = json.loads(sys.stdin.readline())
    print("ready", flush=True)
    load = Load(**job["load"], begin=float(sys.stdin.readline()))
    seen = asyncio.run(run((job["host"], job["port"]), load, job["streams"]))
    print(json.dumps(vars(seen)))


if __name__ == "__main__":
    main()
