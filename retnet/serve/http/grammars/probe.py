"""Trial compilations of grammars in a process of their own.

A grammar from a client can take llguidance any time and memory, and one with long chains of rules overflows the stack,
which ends the process. So a child process compiles it first and takes a few steps with it, under limits of CPU time,
memory and wall time. The child runs this file by its path and imports llguidance alone.
"""

from __future__ import annotations

import base64
import json
import os
import random
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import llguidance

MAX_MESSAGE = 400  # characters of an error
MEMORY = 2**30  # bytes that a trial may allocate
PROBE_STACK, COMPILE_STACK = 8 * 2**20, 64 * 2**20  # bytes: the server's own threads have more than the trial's
WALK, WALK_SECONDS = 256, 0.5  # tokens of a trial, and CPU time after which it is over
SLOWEST_STEP = 0.25  # seconds of CPU time for the mask of one token
WALL = 5  # wall time of a trial, in multiples of its CPU time: other processes may take the CPU
START = 30.0  # seconds until a child has to have started
# llguidance's own limits. The first two bound the work for one mask, the others a compilation and its memory.
LIMITS = {
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "initial_lexer_fuel": 1_000_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 30_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}


Encode = Callable[[str], Sequence[int]]


class _Texts:
    """The vocabulary as llguidance reads it. It asks for the tokens of a text where a grammar leaves no other text."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, texts: list[bytes], end: int, encode: Encode | None):
        self.tokens, self.eos_token_id, self._encode = texts, end, encode
        self.greedy: Encode = lambda _: []

    def __call__(self, text: str) -> list[int]:
        if self._encode is not None:
            tokens = list(self._encode(text))
            if b"".join([self.tokens[token] for token in tokens]) == text.encode():
                return tokens
        return list(self.greedy(text))


def tokenizer_of(texts: list[bytes], ends: Sequence[int], encode: Encode | None = None) -> llguidance.LLTokenizer:
    """llguidance's tokenizer.

    texts: the bytes of each token, b"" for those without text. ends: tokens that end an output, at least one. encode:
    the tokens of a text; by default the longest that fit, one after another.
    """
    own = _Texts(texts, ends[0], encode)
    tokenizer = llguidance.LLTokenizer(own, eos_token=list(ends))  # type: ignore[arg-type]
    own.greedy = tokenizer.greedy_tokenize
    return tokenizer


def compiled(tokenizer: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    """A matcher at the beginning of its output. Raises ValueError for a grammar that cannot be compiled."""
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=llguidance.LLParserLimits(**LIMITS))
    if matcher.is_error():
        raise ValueError(short_error(matcher.get_error()))
    return matcher


_PLAINER = {
    "NoExtensionBias": "no text fits it",
    "missing special token prefix": "it names special tokens; accepted: text alone",
}


def short_error(error: str) -> str:
    """The part of llguidance's message that is about the grammar."""
    for mark in ("<backtrace>", "<non-verbose/>", "<state>"):
        error = error.split(mark)[0]
    error = error.strip().removeprefix("panic: ")
    error = _PLAINER.get(error, error)
    return error if len(error) <= MAX_MESSAGE else f"{error[:MAX_MESSAGE]}..."


class Probe:
    """A child process that tries grammars, one after another. It starts with the first, and again after a failure.

    seconds: of CPU time for one grammar.
    """

    def __init__(self, texts: list[bytes], ends: Sequence[int], seconds: float):
        self._hello = {"texts": [base64.b64encode(text).decode() for text in texts], "ends": list(ends)}
        self._seconds = seconds
        self._child: subprocess.Popen[bytes] | None = None

    def check(self, grammar: str) -> str | None:
        """Why a grammar is refused, or None."""
        if self._child is None:
            self._child = self._start()
        answer = self._ask({"grammar": grammar, "seconds": self._seconds}, WALL * self._seconds)
        if answer is not None:
            return answer["error"]
        status = self.close()
        if status in (-signal.SIGPROF, -signal.SIGKILL):
            return f"its compilation takes longer than {self._seconds:g} s"
        return "its compilation takes too much memory, or its rules refer to each other too deeply"

    def close(self) -> int | None:
        """End the child; its exit status, if there is one."""
        child, self._child = self._child, None
        if child is None:
            return None
        try:
            child.wait(0.2)
        except subprocess.TimeoutExpired:
            child.kill()
        status = child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # what it had not read
        return status

    def _start(self) -> subprocess.Popen[bytes]:
        self._child = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if self._ask(self._hello, START) is None:
            self.close()
            raise RuntimeError("the process that tries grammars does not start")
        return self._child

    def _ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The child's answer; None if it ended or is late."""
        child = self._child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(question).encode() + b"\n")
            child.stdin.flush()
        except BrokenPipeError:
            return None
        if not select.select([child.stdout], [], [], seconds)[0]:
            return None
        line = child.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None


def _walk(tokenizer: llguidance.LLTokenizer, matcher: llguidance.LLMatcher, texts: list[bytes]) -> None:
    """Take random steps. Raises ValueError for a grammar that no text fits, or whose steps take too long."""
    words, ends = _bits(token for token, text in enumerate(texts) if text), _bits(tokenizer.eos_tokens)
    draw, until = random.Random(0), time.process_time() + WALK_SECONDS
    for step in range(WALK):
        before = time.process_time()
        if before > until:
            return
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        taken = time.process_time() - before
        if matcher.is_error():
            raise ValueError(f"{short_error(matcher.get_error())} (after {step} tokens of an output)")
        if taken > SLOWEST_STEP:
            raise ValueError(f"the mask of one token takes {taken:.2f} s; accepted: {SLOWEST_STEP} s")
        allowed = mask & words
        if not allowed:
            if not step and not mask & ends:
                raise ValueError("no text of this tokenizer fits it")
            return
        first = draw.randrange(len(texts))
        later = allowed >> first << first or allowed
        matcher.consume_token((later & -later).bit_length() - 1)


def _bits(tokens: Iterable[int]) -> int:
    mask = bytearray()
    for token in tokens:
        mask.extend(bytes(max(0, token // 8 + 1 - len(mask))))
        mask[token // 8] |= 1 << token % 8
    return int.from_bytes(mask, "little")


def _try(tokenizer: llguidance.LLTokenizer, texts: list[bytes], grammar: str) -> str | None:
    try:
        _walk(tokenizer, compiled(tokenizer, grammar), texts)
    except ValueError as error:
        return str(error)
    return None


def _limit_resources() -> None:
    """Bounds on this process. Where the system has no /proc, its memory is not bounded."""
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    resource.setrlimit(resource.RLIMIT_STACK, (PROBE_STACK, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as pages:
            size = int(pages.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))


def main() -> None:
    """The child: a line with the vocabulary, then one line per grammar."""
    hello = json.loads(sys.stdin.buffer.readline())
    texts = [base64.b64decode(text) for text in hello["texts"]]
    tokenizer = tokenizer_of(texts, hello["ends"])
    _limit_resources()
    answer: dict[str, Any] = {}
    while True:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        line = sys.stdin.buffer.readline()
        if not line:
            return
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, question["seconds"])  # its SIGPROF ends this process
        answer = {"error": _try(tokenizer, texts, question["grammar"])}
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main()
