from __future__ import annotations

import random
import threading
import time

import pytest
import torch

from retnet.data.tokenizer import DOCUMENT_START, ByteTokenizer
from retnet.serve.http.grammars import matcher as module
from retnet.serve.http.grammars.constraints import Constraints
from retnet.serve.http.grammars.matcher import GrammarError, MaskThreads, bits_of
from tests.serve.http.grammars.tools import allowed_by, at_random, constraint, draw

VOCAB = 257
EXPENSIVE_LATER = constraint(regex="[xy]{300}((a{100}){100}){20}")  # the trial does not get that far
AMBIGUOUS = constraint(grammar='start: s\ns: s s s | "a" | "aa" | "b" s | ""\n')


@pytest.fixture(scope="module")
def constraints():
    made = Constraints(ByteTokenizer(), VOCAB)
    yield made
    made.close()


def test_a_mask_has_one_bit_per_token():
    mask = bits_of([0, 31, 32, 70], 3)
    assert mask.dtype == torch.int32
    words = [int(word) & 0xFFFFFFFF for word in mask]
    assert words == [1 | 1 << 31, 1, 1 << 6]


def test_a_token_that_does_not_fit_is_refused_and_changes_nothing(constraints):
    matcher = constraints.compile_here(constraint(regex="ab+")).matcher()
    for wrong in (ord("b"), DOCUMENT_START, 255, 256 * 40, -1):
        assert not matcher.accept(wrong)
    assert matcher.accept(ord("a"))
    assert not matcher.accept(DOCUMENT_START)
    assert matcher.accept(ord("b"))
    assert allowed_by(matcher, VOCAB) == [ord("b"), DOCUMENT_START]


def test_an_output_ends_where_nothing_may_follow_or_at_an_end_token(constraints):
    matcher = constraints.compile_here(constraint(regex="ab?")).matcher()
    assert matcher.accept(ord("a"))
    assert not matcher.ended
    assert matcher.accept(DOCUMENT_START)
    assert matcher.ended
    matcher.rollback(1)
    assert not matcher.ended
    assert matcher.accept(ord("b"))
    assert matcher.ended
    assert allowed_by(matcher, VOCAB) == [DOCUMENT_START]


@pytest.mark.parametrize(
    "wanted",
    [
        constraint(json_object=True),
        constraint(regex="(ab|a)*c{0,9}"),
        constraint(grammar='start: "(" start ")" | /x+/ start?\n'),
    ],
    ids=["json", "regex", "grammar"],
)
def test_rolling_back_gives_the_masks_of_the_tokens_before(constraints, wanted):
    rng = random.Random(0)
    grammar = constraints.compile_here(wanted)
    for _ in range(6):
        matcher = grammar.matcher()
        masks, tokens = [allowed_by(matcher, VOCAB)], []
        for _ in range(25):
            if tokens and (matcher.ended or rng.random() < 0.3):
                count = rng.randint(1, min(8, len(tokens)))
                matcher.rollback(count)
                del tokens[-count:], masks[-count:]
                assert allowed_by(matcher, VOCAB) == masks[-1]
            tokens.append(rng.choice(masks[-1]))
            assert matcher.accept(tokens[-1])
            masks.append(allowed_by(matcher, VOCAB))


def test_only_tokens_of_the_output_are_rolled_back(constraints):
    matcher = constraints.compile_here(constraint(regex="a*")).matcher()
    matcher.rollback(0)
    with pytest.raises(ValueError, match="0 to 0"):
        matcher.rollback(1)


def test_outputs_of_one_grammar_do_not_mix(constraints):
    grammar = constraints.compile_here(constraint(json_object=True))
    alone = [draw(constraints, constraint(json_object=True), VOCAB, at_random(seed), most=60) for seed in range(8)]
    crowd = [(grammar.matcher(), at_random(seed), []) for seed in range(8)]
    for _ in range(60):
        for matcher, choose, tokens in crowd:
            if not matcher.ended:
                tokens.append(choose(allowed_by(matcher, VOCAB)))
                assert matcher.accept(tokens[-1])
    assert [tokens for _, _, tokens in crowd] == alone


def test_a_mask_that_takes_too_long_fails_its_output_alone(constraints, monkeypatch):
    monkeypatch.setattr(module, "STEP_SECONDS", 0.005)
    matcher = constraints.compile_here(EXPENSIVE_LATER).matcher()
    other = constraints.compile_here(constraint(regex="a*")).matcher()
    for _ in range(300):
        assert matcher.accept(ord("x"))
    before = time.perf_counter()
    with pytest.raises(
        GrammarError, match=r"after 300 tokens of the output: the mask of one token takes more than 0\.005"
    ):
        matcher.fill(torch.zeros(9, dtype=torch.int32))
    assert time.perf_counter() - before < 5
    with pytest.raises(GrammarError):
        matcher.accept(ord("x"))
    assert other.accept(ord("a"))
    assert constraints.compile_here(constraint(regex="b")).matcher().accept(ord("b"))


def test_masks_that_are_slow_on_average_fail_their_output(constraints, monkeypatch):
    monkeypatch.setattr(module, "TOTAL_SECONDS", 0.02)
    monkeypatch.setattr(module, "SECONDS_PER_TOKEN", 1e-5)
    with pytest.raises(GrammarError, match="masks took"):
        draw(constraints, AMBIGUOUS, VOCAB, lambda allowed: 97, most=400)


def test_threads_that_are_stuck_are_replaced_and_too_many_are_refused(constraints, monkeypatch):
    monkeypatch.setattr(module, "MOST_STUCK", 2)
    threads = MaskThreads(1)
    release = threading.Event()
    stuck = [threads.start(release.wait) for _ in range(2)]  # type: ignore[arg-type]
    threads.abandon(stuck[0])
    assert not threads.overloaded
    threads.abandon(stuck[1])
    assert threads.overloaded
    grammar = constraints.compile_here(constraint(regex="a"))
    monkeypatch.setattr(grammar, "threads", threads)
    with pytest.raises(GrammarError, match="too many masks"):
        grammar.matcher()
    release.set()
    assert threads.start(lambda: None).done.acquire(timeout=5)
    deadline = time.monotonic() + 5
    while threads.overloaded and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads.overloaded
    threads.close()


def test_a_grammar_that_failed_is_compiled_anew(constraints):
    """Its lexer, which all its outputs share, may be full."""
    first = constraints.compile_here(EXPENSIVE_LATER)
    with pytest.raises(GrammarError, match="too many states"):
        draw(constraints, EXPENSIVE_LATER, VOCAB, lambda allowed: allowed[0], most=400)
    assert constraints.compile_here(EXPENSIVE_LATER) is not first
