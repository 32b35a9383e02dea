"""Random requests with every option on, over every kind of stack, beside a naive reference."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from retnet.models.decode.sampling import Sampling
from retnet.models.lm import LanguageModel
from retnet.models.snapshot import Snapshot
from retnet.serve.engine import Engine
from retnet.serve.request import Refused, Request, Status
from retnet.serve.speculation import Speculation
from tests.small_models import VOCAB, small_model

from .automaton import Automaton, cycle, random_automaton
from .naive import Case, check

STACKS = ["hybrid", "experts", "gated", "both decays", "convolution", "retention"]
EOS, ROOM = 7, 120
KNOWN = {
    "length", "stop_token", "stop_string", "grammar_end", "no output", "failed", "cancelled",
    "accepted", "hits", "forks", "continued", "refused",
}  # fmt: skip


def text_of(tokens: Sequence[int]) -> str:
    """Each token has 0, 1 or 2 characters of a small alphabet, so that stop strings are common."""
    return "".join(chr(97 + t % 5) * (t % 3) for t in tokens)


def random_sampling(rng: random.Random) -> Sampling:
    bias = {
        rng.randrange(VOCAB): rng.choice([-3.0, 2.0, 8.0, -float("inf")]) for _ in range(rng.choice([0, 0, 1, 4, 40]))
    }
    if rng.random() < 0.2:  # under a grammar, perhaps nothing is left
        bias |= dict.fromkeys(rng.sample(range(1, VOCAB), 50), -float("inf")) | {0: -3.0}
    return Sampling(
        temperature=rng.choice([0, 0, 0.3, 0.8, 1.0, 1.7]),
        top_k=rng.choice([None, None, 1, 4, 20, 1000]),
        top_p=rng.choice([None, None, 0.3, 0.9, 1.0]),
        min_p=rng.choice([None, None, 0.0, 0.05, 0.4]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3, 0.8]),
        presence_penalty=rng.choice([0.0, 0.0, 0.7, -0.4]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.3, -0.2]),
        logit_bias=bias,
        logprobs=rng.choice([None, None, 0, 3, 20]),
        seed=rng.choice([None, 0, rng.randrange(2**63), 2**63 - 1]),
    )


def random_prompt(rng: random.Random, texts: list[list[int]]) -> list[int]:
    """A part of one of a few texts, often with an ending of its own; sometimes it repeats itself."""
    prompt = rng.choice(texts)[: rng.choice([1, 2, 8, 9, rng.randint(1, 40), 24, 32])]
    if rng.random() < 0.6:
        prompt = [*prompt, *rng.choices(range(VOCAB), k=rng.randint(1, 8))]
    return (prompt[:7] * 5)[:35] if rng.random() < 0.2 else prompt


def random_request(rng: random.Random, prompt: list[int], endless: bool) -> Request:
    stop_strings = rng.choice([(), (), ("".join(rng.choices("abcde", k=rng.randint(2, 4))), "zz", "ab")])
    return Request(
        prompt,
        None if endless and rng.random() < 0.1 else rng.choice([0, 1, 2, rng.randint(1, 24), rng.randint(1, 24)]),
        random_sampling(rng),
        stop_tokens=rng.choice([(), (), tuple(rng.choices(range(VOCAB), k=3))]),
        stop_strings=stop_strings,
        ignore_eos=rng.random() < 0.5,
        shared=rng.randint(0, len(prompt)) if rng.random() < 0.5 else 0,
        keep_state=rng.random() < 0.3,
        prefix_group=rng.choice(["", "", "", "a", None]),
        prompt_logprobs=rng.choice([None, None, None, 0, 1, 20]),
        grammar=random_grammar(rng) if rng.random() < 0.35 else None,
        counted=rng.choice([None, None, (), tuple(prompt[::2]), tuple(rng.choices(range(VOCAB), k=9))]),
    )


def random_grammar(rng: random.Random) -> Automaton:
    if rng.random() < 0.2:
        return cycle(rng.choices(range(VOCAB), k=rng.randint(1, 5)))
    return random_automaton(rng, VOCAB, eos=rng.choice([EOS, None]), num_states=rng.randint(1, 6))


def random_engine(rng: random.Random, model: LanguageModel, endless: bool) -> Engine:
    chunk = rng.choice([4, 8, 16])
    deferring = rng.choice(
        [{}, {"speculation": Speculation(rng.choice([3, 7]), rng.choice([1, 3]))}, {"deferred_writes": 16}]
    )
    cache = {"prefix_cache_bytes": rng.choice([10**5, 10**6]), "prefix_interval": rng.choice([None, chunk, 2 * chunk])}
    return Engine(
        model,
        num_slots=rng.choice([1, 4, 8]),
        max_tokens=None if endless else ROOM,
        prompt_chunk=chunk,
        prompt_budget=rng.choice([None, 1, 3 * chunk]),
        max_waiting=rng.choice([None, 6]),
        decode=text_of,
        **deferring,
        **rng.choice([{}, cache]),
    )


@dataclass
class Session:
    """Engines over one model that share snapshots, and everything that was asked of them."""

    rng: random.Random
    model: LanguageModel
    endless: bool
    cases: list[Case] = field(default_factory=list)
    snapshots: list[tuple[Snapshot, Case]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def run(self, num_requests: int, num_engines: int) -> None:
        texts = [self.rng.choices(range(VOCAB), k=40) for _ in range(4)]
        for number in range(num_engines):
            engine = random_engine(self.rng, self.model, self.endless)
            mine: list[Case] = []
            while len(self.cases) + len(mine) < num_requests * (number + 1) // num_engines or not engine.idle:
                if len(self.cases) + len(mine) < num_requests * (number + 1) // num_engines and self.rng.random() < 0.5:
                    for _ in range(self.rng.randint(1, 4)):
                        self.ask(engine, mine, texts)
                elif not any(case.generation.request.max_new_tokens for case in mine if not case.generation.finished):
                    for case in mine:  # only endless ones are left
                        engine.cancel(case.generation)
                engine.step()
                self.disturb(engine, [case for case in mine if not case.generation.finished])
            assert engine.pool.num_free == engine.pool.num_slots
            stats = engine.stats()
            self.counts["accepted"] += stats.accepted
            self.counts["hits"] += 0 if stats.prefix is None else stats.prefix.hits
            self.cases += mine
            self.snapshots += [(c.generation.snapshot, c) for c in mine if c.generation.snapshot is not None]

    def ask(self, engine: Engine, mine: list[Case], texts: list[list[int]]) -> None:
        """Submit a request: a new one, one that continues a snapshot, or a fork."""
        rng, prompt = self.rng, random_prompt(self.rng, texts)
        decoding = [case for case in mine if case.generation.status is Status.DECODING]
        kind = rng.random()
        source = after = None
        if kind < 0.2 and self.snapshots:
            after, source = rng.choice(self.snapshots[-20:])
        elif kind < 0.35 and decoding:
            source = rng.choice(decoding)
        if source is not None and rng.random() < 0.5:
            prompt = []
        earlier = (
            []
            if source is None
            else [*source.context, *source.generation.tokens]
            if after is None
            else list(after.tokens)
        )
        if len(earlier) + len(prompt) > ROOM - 24:
            return
        request = random_request(rng, prompt, self.endless)
        try:
            if source is not None and after is None:
                generation = engine.fork(source.generation, request)
                self.counts["forks"] += 1
            else:
                generation = engine.submit(request, after)
                self.counts["continued"] += after is not None
        except Refused as error:
            self.counts["refused" if "wait; accepted" in str(error) else f"refused: {error}"] += 1
            return
        context = [*earlier, *prompt]
        counted_from = source.counted_from if source is not None and not prompt else len(context)
        ends = {*request.stop_tokens, *([] if request.ignore_eos else [EOS])}
        mine.append(Case(generation, context, counted_from, frozenset(ends), len(earlier), request.grammar))

    def disturb(self, engine: Engine, running: list[Case]) -> None:
        """Now and then cancel a request, or keep the state of one."""
        if running and self.rng.random() < 0.04:
            engine.cancel(self.rng.choice(running).generation)
        decoding = [case for case in running if case.generation.status is Status.DECODING]
        if decoding and self.rng.random() < 0.1:
            case = self.rng.choice(decoding)
            snapshot = engine.snapshot(case.generation)
            assert list(snapshot.tokens) == [*case.context, *case.generation.tokens]
            self.snapshots.append((snapshot, case))


def requests_over(stack: str, num_requests: int, num_engines: int, seed: int) -> tuple[Session, int]:
    model = small_model(stack, dtype="float64", eos_token_id=EOS)
    session = Session(random.Random(seed), model, endless=stack not in ("hybrid",))
    session.run(num_requests, num_engines)
    close = check(model, session.cases, text_of)
    for case in session.cases:
        session.counts[case.generation.finish_reason or "unfinished"] += 1
        session.counts["no output"] += case.generation.finish_reason == "length" and not case.generation.tokens
    return session, close


@pytest.mark.parametrize("stack", STACKS)
def test_every_token_and_ending_is_that_of_the_naive_reference(stack):
    session, close = requests_over(stack, 14, 2, seed=1)
    assert close == 0
    assert len(session.cases) >= 14
    assert set(session.counts) <= KNOWN


@pytest.mark.slow
@pytest.mark.parametrize("stack", STACKS)
def test_thousands_of_requests_are_those_of_the_naive_reference(stack):
    session, close = requests_over(stack, 1000, 20, seed=3)
    assert close <= 2
    counts = session.counts
    assert set(counts) == KNOWN
    assert min(counts.values()) >= 10
