from __future__ import annotations

import json
import os
import signal
import time

import pytest

from retnet.serve.http.grammars.probe import Probe, short_error

TEXTS = [bytes([byte]) for byte in range(255)] + [b"", b""]
END = 256


def lark(text: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": text}]})


@pytest.fixture
def probe():
    made = Probe(TEXTS, [END], seconds=1.0)
    yield made
    made.close()


def test_one_child_tries_many_grammars(probe):
    assert probe.check(lark('start: "a"')) is None
    child = probe._child
    assert "unknown name" in probe.check(lark("start: x"))
    assert probe.check(lark("start: /a+/")) is None
    assert probe._child is child


def test_a_child_that_dies_costs_one_refusal(probe):
    assert probe.check(lark('start: "a"')) is None
    os.kill(probe._child.pid, signal.SIGSEGV)
    while probe._child.poll() is None:
        time.sleep(0.01)
    assert probe.check(lark('start: "a"')) is not None
    assert probe.check(lark('start: "a"')) is None


def test_a_stack_overflow_does_not_reach_this_process(probe):
    chain = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(20_000)) + 'r20000: "a"\n'
    assert "too deeply" in probe.check(lark(chain))


def test_the_child_ends_with_this_process(probe):
    """Its end of the pipe is closed, and what it computes ends with its timer."""
    assert probe.check(lark('start: "a"')) is None
    child = probe._child
    child.stdin.close()
    assert child.wait(5) == 0
    probe._child = None
    child.stdout.close()


def test_long_messages_are_cut():
    assert short_error("panic: no\n<backtrace>\n 0: f") == "no"
    assert len(short_error("x" * 10_000)) < 500
