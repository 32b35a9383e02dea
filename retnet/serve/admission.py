"""Admission: checks a request against an engine's limits and turns it into a generation that waits for a slot."""

import math
import secrets
from array import array
from collections.abc import Mapping
from functools import cached_property

from retnet.models.fingerprint import fingerprint
from retnet.models.lm import LanguageModel
from retnet.models.snapshot import Snapshot
from retnet.models.states import ModelState
from retnet.serve.constrained import ConstrainedOutput
from retnet.serve.grammar import Grammar
from retnet.serve.logprobs import PromptLogprobs
from retnet.serve.pool import SlotPool
from retnet.serve.request import Generation, Refused, Request
from retnet.serve.stopping import Decode, StopStrings
from retnet.system.checks import quoted


class Admission:
    """The limits of one engine. decode: token ids to text, for stop strings; max_waiting: None for any number."""

    def __init__(self, model: LanguageModel, pool: SlotPool, decode: Decode | None, max_waiting: int | None):
        self.model, self.pool, self.decode, self.max_waiting = model, pool, decode, max_waiting
        self._eos_token_ids = model.eos_token_ids
        self._identity = object()

    @cached_property
    def fingerprint(self) -> str:
        """The model's fingerprint in snapshots."""
        return fingerprint(self.model)

    def admit(self, request: Request, after: Snapshot | None, num_waiting: int) -> Generation:
        """The generation of a request. Raises Refused for what this engine cannot serve."""
        if not isinstance(request, Request):
            raise Refused(f"request is of type {type(request).__name__}; accepted: a Request")
        if after is not None and not isinstance(after, Snapshot):
            raise Refused(f"after is of type {type(after).__name__}; accepted: a Snapshot or None")
        seen = array("i", after.tokens if after is not None else ())
        num_earlier = len(seen)
        seen.extend(request.prompt)
        self._check_tokens(seen, request)
        self._check_length(request, len(seen))
        if self.max_waiting is not None and num_waiting >= self.max_waiting + self.pool.num_free:
            raise Refused(
                f"all {self.pool.num_slots} slots are taken and {num_waiting} requests wait; accepted: "
                f"{self.max_waiting} waiting (another slot costs {self.pool.cost.total:,} bytes)"
            )
        if after is not None:
            self.check_snapshot(after)
        stops = None
        if request.stop_strings:
            if self.decode is None:
                raise Refused("stop_strings need text; accepted: an engine made with `decode`")
            stops = StopStrings(request.stop_strings, self.decode, seen)
        constraint = None if request.grammar is None else self._constraint(request.grammar, request.sampling.logit_bias)
        seed = request.sampling.seed
        earlier_output = after.output_start if after is not None and not len(request.prompt) else None
        return Generation(
            owner=self._identity,
            request=request,
            seed=secrets.randbits(63) if seed is None else seed,
            seen=seen,
            read=0 if after is None else num_earlier - 1,
            output_start=len(seen),
            counted_from=len(seen) if earlier_output is None else earlier_output,
            shared_end=num_earlier + request.shared if request.shared else 0,
            ends=self._ends(request),
            start=after,
            stops=stops,
            constraint=constraint,
            scores=None if request.prompt_logprobs is None else PromptLogprobs(request.prompt_logprobs),
            rounding_error=0.0 if after is None else after.rounding_error,
            initial=None if after is None else after.initial,
        )

    def _constraint(self, grammar: Grammar, logit_bias: Mapping[int, float]) -> ConstrainedOutput:
        banned = [token for token, bias in logit_bias.items() if bias == -math.inf]
        try:
            return ConstrainedOutput(grammar, self.model.config.vocab_size, banned)
        except Exception as error:  # from the caller's grammar
            raise Refused(f"the grammar has no matcher ({error!r}); accepted: a Grammar that has one") from error

    def why_stale(self, snapshot: Snapshot | None) -> str | None:
        """Why a snapshot that was accepted earlier can no longer be continued, if so."""
        if snapshot is None:
            return None
        if snapshot.model != self.fingerprint:
            return "the weights changed after its snapshot was taken"
        try:
            self.check_snapshot(snapshot)
        except Refused as error:
            return f"while it waited, {error}"
        return None

    def forget_fingerprint(self) -> None:
        """Take the fingerprint anew when it is next needed: the weights have changed."""
        vars(self).pop("fingerprint", None)

    def _ends(self, request: Request) -> frozenset[int]:
        return frozenset(request.stop_tokens if request.ignore_eos else (*request.stop_tokens, *self._eos_token_ids))

    def check_owner(self, generation: Generation) -> None:
        """Raise ValueError for anything but a generation of this engine."""
        if not isinstance(generation, Generation):
            raise ValueError(f"the generation is of type {type(generation).__name__}; accepted: one of this engine's")
        if generation.owner is not self._identity:
            raise ValueError("the request was submitted to another engine; accepted: one of this engine's")

    def _check_tokens(self, seen: array, request: Request) -> None:
        vocab_size, logit_bias = self.model.config.vocab_size, request.sampling.logit_bias
        for tokens in (seen, logit_bias, request.counted or ()):
            if len(tokens) and not 0 <= min(tokens) <= max(tokens) < vocab_size:
                wrong = next(token for token in tokens if not 0 <= token < vocab_size)
                raise Refused(f"token {quoted(wrong)} is not in the vocabulary; accepted: 0 to {vocab_size - 1}")
        if sum(value == -math.inf for value in logit_bias.values()) == vocab_size:
            raise Refused("logit_bias bans every token; accepted: at least one token that may come")

    def _check_length(self, request: Request, num_tokens: int) -> None:
        limit, new = self.pool.max_tokens, request.max_new_tokens
        if num_tokens == 0:
            raise Refused("the prompt is empty; accepted: at least one token, or a snapshot to continue")
        if new is not None and new < 0:
            raise Refused(f"max_new_tokens is {quoted(new)}; accepted: 0 or more, or None for no end")
        if limit is not None and (new is None or num_tokens + new > limit):
            more = "an endless output" if new is None else f"max_new_tokens {quoted(new)}"
            raise Refused(f"{num_tokens} tokens and {more} need more room than a slot has; accepted: {limit} together")

    def check_snapshot(self, snapshot: Snapshot) -> None:
        """Raise Refused for a snapshot that this engine cannot continue."""
        try:
            snapshot.check()
        except ValueError as error:
            raise Refused(f"the snapshot was changed: {error}") from error
        if snapshot.model != self.fingerprint:
            raise Refused(
                f"the snapshot is of another model ({snapshot.model[:12]}) than this engine's "
                f"({self.fingerprint[:12]}); accepted: the same weights, dtype and configuration{self._whose_heads()}"
            )
        if not _same_shapes(snapshot.state, self.pool.state):
            raise Refused("the snapshot's tensors do not have the shapes of this model's states")

    def _whose_heads(self) -> str:
        shard = self.model.shard
        return "" if shard is None else f", and the heads of the same process: this one is {shard} of a split model"


def _same_shapes(state: ModelState, slots: ModelState) -> bool:
    """Whether the state of one sequence fits into the slots; caches may hold any number of tokens."""
    parts, places = state.layers, slots.layers
    if state.mtp and slots.mtp:  # otherwise it begins anew, or is left out
        parts, places = state.parts, slots.parts
    if [type(part) for part in parts] != [type(place) for place in places]:
        return False
    for mine, theirs in zip(parts, places, strict=True):
        if mine.tensors().keys() != theirs.tensors().keys():
            return False
        for name, x in theirs.tensors().items():
            shape, found = list(x.shape), list(mine.tensors()[name].shape)
            if name in theirs.per_token:
                shape[1:2], found[1:2] = [], []
            if found != [1, *shape[1:]]:
                return False
    return True
