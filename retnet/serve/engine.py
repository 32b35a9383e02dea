"""The engine: requests join, run and leave at any step; ids in, ids out.

Each step reads blocks of waiting prompts within a budget of tokens, then decodes one token for every running request.
Decoding always runs all slots, and prompts are cut at fixed places and read one at a time, so that a request's logits
are the same bits whatever else is in the batch. The last token of a context is always read by a decode step: that is
what makes a snapshot, a cached prefix and a fork go on with the very tokens of the request that they were taken from.

Left out: a server, and batching across devices. Experts of a mixture see as many rows as chose them, so there a
request's logits are equal up to rounding only.
"""

import math
import secrets
from array import array
from collections import deque
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch

from retnet.layers.moe import MoE
from retnet.models.decode.sampling import Sampled, SamplingParts, SamplingTable
from retnet.models.decode.step import FAILED, DecodeStep
from retnet.models.fingerprint import fingerprint
from retnet.models.lm import LanguageModel
from retnet.models.states import ModelState
from retnet.ops.device import current_device_of
from retnet.serve.pool import SlotCost, SlotPool
from retnet.serve.prefix import PrefixCache, PrefixCounts
from retnet.serve.request import Failed, Generation, Refused, Request, Status, TokenLogprobs
from retnet.serve.snapshot import Snapshot
from retnet.serve.speculation import PromptLookup, Speculation, VerifyStep
from retnet.serve.stopping import Decode, StopStrings

# Tokens of a prompt a call. A GPU is busy only with many; a CPU computes fewer while running requests wait.
PROMPT_BLOCK = {"cpu": 256, "cuda": 2048}
NOT_FINITE = "the logits of token {} are not finite: its state or the weights are not"
RINGS = (16, 32, 64)  # rows of deferred writes: blocks that tensor cores sum over


@dataclass(frozen=True)
class EngineStats:
    """Where the engine stands. drafted, accepted: tokens guessed, and guessed right. prefix: None without a cache."""

    num_slots: int
    bytes_per_slot: SlotCost
    running: int
    waiting: int
    steps: int
    prompt_tokens: int
    new_tokens: int
    drafted: int
    accepted: int
    prefix: PrefixCounts | None


class Engine:
    """Many generations over one model, in memory fixed at the start.

    Args:
        model: in evaluation mode, on its device; stacks with Hyena layers are refused.
        num_slots, memory_bytes: requests that run at a time, or the bytes that they may take; one of the two.
        max_tokens: context that a slot has room for; needed by attention without a window, a limit for all requests.
        prompt_block: tokens of a prompt a call, 256 on a CPU and 2048 on a GPU if None; part of what the engine
            computes, as rounding depends on it.
        prompt_budget: prompt tokens a step (at least one block is read), so that running requests keep their pace; one
            block if None.
        prefix_cache_bytes: keep states of prompts' beginnings; prefix_interval: also every so many tokens inside them.
        max_waiting: requests that may wait for a slot (any number if None).
        decode: token ids to text; needed for stop strings.
        speculation: guess several tokens a step from the context (`serve/speculation.py`).
        deferred_writes: let retention states lie up to so many tokens behind and read the last ones beside them: near
            half the state's traffic, for rows of k and v. 16, 32 or 64; 0 writes every token.
        graphs: capture decode steps as CUDA graphs; on a GPU if None, but for mixtures of experts, whose shapes depend
            on what they route.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        num_slots: int | None = None,
        memory_bytes: int | None = None,
        max_tokens: int | None = None,
        prompt_block: int | None = None,
        prompt_budget: int | None = None,
        prefix_cache_bytes: int | None = None,
        prefix_interval: int | None = None,
        max_waiting: int | None = None,
        decode: Decode | None = None,
        speculation: Speculation | None = None,
        deferred_writes: int = 0,
        graphs: bool | None = None,
    ):
        device = model.embedding.weight.device
        if prompt_block is None:
            prompt_block = PROMPT_BLOCK.get(device.type, PROMPT_BLOCK["cpu"])
        prompt_budget = prompt_block if prompt_budget is None else prompt_budget
        for name, value in (("prompt_block", prompt_block), ("prompt_budget", prompt_budget)):
            if value < 1:
                raise ValueError(f"{name} is {value}; accepted: a positive integer")
        if prefix_interval is not None and (prefix_interval < 1 or prefix_interval % prompt_block):
            raise ValueError(
                f"prefix_interval is {prefix_interval}; accepted: a multiple of prompt_block ({prompt_block})"
            )
        if model.training:
            raise ValueError("the model is in training mode; accepted: evaluation mode (model.eval())")
        self.model, self.decode = model, decode
        self.prompt_block, self.prompt_budget = prompt_block, prompt_budget
        self.max_waiting, self.prefix_interval = max_waiting, prefix_interval
        _check_deferred_writes(deferred_writes, speculation)
        if speculation is not None:
            speculation.check(model.config, max_tokens)
        self.pool = SlotPool(
            model,
            num_slots=num_slots,
            memory_bytes=memory_bytes,
            max_tokens=max_tokens,
            deferred_writes=deferred_writes,
            draft_tokens=0 if speculation is None else speculation.draft_tokens,
        )
        self.prefixes = None if prefix_cache_bytes is None else PrefixCache(prefix_cache_bytes)
        self.table = SamplingTable(self.pool.num_slots, model.config.vocab_size, device)
        graphs = _use_graphs(graphs, model, device)
        self.speculation = speculation
        if speculation is None:
            self._step = DecodeStep(model, self.pool.state, self.table, graphs, self.pool.deferred)
        else:
            width = speculation.draft_tokens + 1
            self._step = VerifyStep(model, self.pool.state, self.table, graphs, width)
        self._identity = object()
        self._lookups: dict[int, PromptLookup] = {}
        self._drafted = self._accepted = 0
        self._waiting: deque[Generation] = deque()
        self._reading: deque[Generation] = deque()
        self._decoding: dict[int, Generation] = {}
        self._parts: SamplingParts | None = None  # that the decoding requests need; None: to be found
        self._fingerprint: str | None = None
        self._steps = self._prompt_tokens = self._new_tokens = 0

    @property
    def fingerprint(self) -> str:
        """What the model is, in snapshots."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.model)
        return self._fingerprint

    @property
    def idle(self) -> bool:
        return not (self._waiting or self._reading or self._decoding)

    def stats(self) -> EngineStats:
        return EngineStats(
            self.pool.num_slots,
            self.pool.cost,
            len(self._reading) + len(self._decoding),
            len(self._waiting),
            self._steps,
            self._prompt_tokens,
            self._new_tokens,
            self._drafted,
            self._accepted,
            None if self.prefixes is None else deepcopy(self.prefixes.counts),
        )

    def warmup(self, *samplings: SamplingParts) -> None:
        """Compile kernels and capture the steps for these sampling parts ahead (plain ones if none are given)."""
        with current_device_of(self._step.tokens):
            for parts in samplings or (SamplingParts(),):
                if self._step.graphs:
                    self._step.capture(parts)
                elif not self._decoding:
                    self._step(parts)

    def submit(self, request: Request, after: Snapshot | None = None) -> Generation:
        """Queue a request; it goes on from the snapshot `after`, if given, and its prompt may then be empty.

        Raises Refused for what this engine can never serve, and if too many requests wait.
        """
        seen = array("i", after.tokens if after is not None else ())
        vocab_size, bias, start = self.model.config.vocab_size, request.sampling.logit_bias, len(seen)
        try:
            seen.extend(array("i", list(request.prompt)))
        except (TypeError, OverflowError) as error:
            raise Refused(f"the prompt holds what is no token id ({error}); accepted: integers") from error
        for tokens in (seen, bias):
            if len(tokens) and not 0 <= min(tokens) <= max(tokens) < vocab_size:
                wrong = next(t for t in tokens if not 0 <= t < vocab_size)
                raise Refused(f"token {wrong} is not in the vocabulary; accepted: 0 to {vocab_size - 1}")
        if sum(value == -math.inf for value in bias.values()) == vocab_size:
            raise Refused("logit_bias bans every token; accepted: one at least that may come")
        self._check(request, after, len(seen))
        stops = None
        if request.stop_strings:
            if self.decode is None:
                raise Refused("stop_strings need text; accepted: an engine made with `decode`")
            stops = StopStrings(request.stop_strings, self.decode)
        seed = request.sampling.seed
        read = 0 if after is None else len(after.tokens) - 1
        earlier = after.output_start if after is not None and not len(request.prompt) else None
        generation = Generation(
            owner=self._identity,
            request=request,
            seed=secrets.randbits(63) if seed is None else seed,
            seen=seen,
            read=read,
            output_start=len(seen),
            counted_from=len(seen) if earlier is None else earlier,
            shared_end=start + request.shared if request.shared else 0,
            start=after,
            stops=stops,
        )
        self._waiting.append(generation)
        return generation

    def _check(self, request: Request, after: Snapshot | None, num_tokens: int) -> None:
        limit, new = self.pool.max_tokens, request.max_new_tokens
        if num_tokens == 0:
            raise Refused("the prompt is empty; accepted: at least one token, or a snapshot to go on from")
        if new is not None and new < 1:
            raise Refused(f"max_new_tokens is {new}; accepted: 1 or more, or None for no end")
        if limit is not None and (new is None or num_tokens + new > limit):
            more = "an endless output" if new is None else f"max_new_tokens {new}"
            raise Refused(f"{num_tokens} tokens and {more} need more room than a slot has; accepted: {limit} together")
        if self.max_waiting is not None and len(self._waiting) >= self.max_waiting + self.pool.num_free:
            raise Refused(
                f"all {self.pool.num_slots} slots are taken and {len(self._waiting)} requests wait; accepted: "
                f"{self.max_waiting} waiting (a slot more costs {self.pool.cost.total:,} bytes)"
            )
        if after is not None and after.model != self.fingerprint:
            raise Refused(
                f"the snapshot is of another model ({after.model[:12]}) than this engine's ({self.fingerprint[:12]}); "
                "accepted: the same weights, dtype and configuration"
            )
        if after is not None and not _fits(after.state, self.pool.state):
            raise Refused("the snapshot's tensors have not the shapes of this model's states")

    def _check_own(self, generation: Generation) -> None:
        if generation.owner is not self._identity:
            raise ValueError("the request was submitted to another engine; accepted: one of this engine's")

    def cancel(self, generation: Generation) -> None:
        """End a request at once, wherever it is; nothing happens to one that has finished."""
        self._check_own(generation)
        if not generation.finished:
            self._finish(generation, "cancelled")

    def step(self) -> list[tuple[Generation, list[int]]]:
        """Let requests in, read prompts, decode once. Returns the new tokens of each request that got some."""
        self._steps += 1
        with current_device_of(self._step.tokens):
            self._admit()
            self._read_prompts()
            return self._decode()

    def run(self) -> None:
        """Step until every request has finished."""
        while not self.idle:
            self.step()

    def stream(self, request: Request, after: Snapshot | None = None) -> Iterator[int]:
        """The tokens of one request as they come; others run along. Leaving the loop cancels it.

        Raises Refused at once as `submit` does, and Failed in the loop if the request fails.
        """
        return self._stream(self.submit(request, after))

    def _stream(self, generation: Generation) -> Iterator[int]:
        sent = 0
        try:
            while not generation.finished or sent < generation.num_new:
                if sent == generation.num_new:
                    self.step()
                new = generation.seen[generation.output_start + sent :]  # of steps that others have taken, too
                sent += len(new)
                yield from new
        finally:
            self.cancel(generation)
        if generation.error is not None:
            raise Failed(f"the request failed: {generation.error}")

    def snapshot(self, generation: Generation) -> Snapshot:
        """The state of a running request as a value: a copy that later steps leave alone.

        Raises ValueError for one without a slot; one that ended has a snapshot if it asked for it (`keep_state`).
        """
        self._check_own(generation)
        if generation.snapshot is not None:
            return generation.snapshot
        if generation.status is not Status.DECODING or generation.slot is None:
            raise ValueError(
                f"the request is {generation.status.value}; accepted: one that is decoding, or ended with keep_state"
            )
        state = self.pool.kept(generation.slot)
        return Snapshot(state, generation.seen[:], self.fingerprint, output_start=generation.counted_from)

    def fork(self, generation: Generation, request: Request) -> Generation:
        """Go on from where a request is, beside it: `request` has its own sampling and more prompt, or none."""
        return self.submit(request, self.snapshot(generation))

    def _admit(self) -> None:
        while self._waiting and self.pool.num_free:
            generation = self._waiting.popleft()
            state = None if generation.start is None else generation.start.state
            if self.prefixes is not None:
                found = self.prefixes.find(generation.seen[:-1], generation.read)
                if found is not None:
                    generation.cached = found[0] - generation.read
                    generation.read, state = found
            generation.slot = self.pool.take(state)
            generation.start = None
            generation.status = Status.READING
            if self.speculation is not None and generation.slot is not None:
                self._lookups[generation.slot] = PromptLookup(self.speculation.longest)
            self._reading.append(generation)

    def _read_prompts(self) -> None:
        """Blocks of prompts, one request after another in turn, while the budget lasts."""
        left = self.prompt_budget
        while self._reading:
            generation = self._reading[0]
            if generation.unread:
                end = self._block_end(generation)
                if end - generation.read > left < self.prompt_budget:
                    return
                left -= end - generation.read
                try:
                    self._read_block(generation, end)
                except ValueError as error:  # of this request alone: others are not in the call
                    self._fail(generation, f"its prompt cannot be read: {error}")
                    continue
            self._reading.popleft()
            if generation.unread:
                self._reading.append(generation)
            else:
                self._start_decoding(generation)

    def _block_end(self, generation: Generation) -> int:
        """Where the next block ends: a multiple of prompt_block, the end of what is shared, before the last token."""
        border = (generation.read // self.prompt_block + 1) * self.prompt_block
        if generation.read < generation.shared_end < border:
            border = generation.shared_end
        return min(border, len(generation.seen) - 1)

    def _read_block(self, generation: Generation, end: int) -> None:
        assert generation.slot is not None
        block = torch.tensor([generation.seen[generation.read : end].tolist()], device=self._step.tokens.device)
        self._step.read(generation.slot, block)  # raises ValueError where it computes what no decay can be
        self._prompt_tokens += end - generation.read
        generation.read = end
        if generation.slot in self._lookups:
            self._lookups[generation.slot].index(generation.seen, end)
        inside = self.prefix_interval is not None and end % self.prefix_interval == 0
        if inside or end in (generation.shared_end, len(generation.seen) - 1):
            self._keep_prefix(generation)

    def _keep_prefix(self, generation: Generation) -> None:
        if self.prefixes is not None and generation.slot is not None and generation.read:
            tokens = generation.seen[: generation.read]
            if not self.prefixes.has(tokens):
                state = self.pool.kept(generation.slot)
                if state.is_finite:  # a failed request's would fail all that begin alike
                    self.prefixes.store(tokens, state)

    def _start_decoding(self, generation: Generation) -> None:
        slot = generation.slot
        assert slot is not None
        seen = torch.frombuffer(generation.seen, dtype=torch.int32).long()
        self.table.fill(slot, generation.request.sampling, generation.seed, seen, seen[generation.counted_from :])
        self._step.tokens[slot] = generation.seen[-1]
        self._step.active[slot] = True
        generation.status = Status.DECODING
        self._decoding[slot] = generation
        self._parts = None

    def _decode(self) -> list[tuple[Generation, list[int]]]:
        if not self._decoding:
            return []
        drafts = self._draft()
        if self._parts is None:
            self._parts = SamplingParts.union(g.request.sampling.parts for g in self._decoding.values())
        sampled = self._sample(self._parts)
        tokens = sampled.tokens.tolist()
        counts = [0] * self.pool.num_slots
        progress, ended = [], []
        for slot, generation in list(self._decoding.items()):
            if generation.finished:  # cancelled by what decodes another's text
                continue
            first, reason = len(generation.seen), None
            draft = [*drafts.get(slot, []), None]
            for t, token in enumerate(tokens[slot]):
                reason = self._accept(generation, token, sampled, (slot, t))
                if reason is not None or token != draft[t]:
                    break
            new = generation.seen[first:].tolist()
            generation.read = len(generation.seen) - 1
            counts[slot] = len(new)
            self._accepted += max(0, len(new) - 1)
            if new:
                progress.append((generation, new))
            if reason is not None and not generation.finished:
                ended.append((generation, reason))
        self._step.settle(counts)
        for generation, reason in ended:
            self._finish(generation, reason)
        return progress

    def _sample(self, parts: SamplingParts) -> Sampled:
        try:
            return self._step(parts)
        except ValueError:
            # A CPU refuses decays that are NaN. A draft leaves states alone: without the broken ones it runs again.
            broken = [g for slot, g in self._decoding.items() if not self.pool.state.slot(slot).is_finite]
            if self.speculation is None or not broken:
                raise
            for generation in broken:
                self._fail(generation, NOT_FINITE.format(len(generation.seen)))
            return self._step(parts)

    def _draft(self) -> dict[int, list[int]]:
        """Guesses by slot, no longer than what is still asked for."""
        if not isinstance(self._step, VerifyStep):
            return {}
        drafts = {}
        for slot, generation in self._decoding.items():
            limit, most = generation.request.max_new_tokens, self._step.drafts.shape[1]
            count = most if limit is None else min(most, limit - generation.num_new - 1)
            drafts[slot] = self._lookups[slot].draft(generation.seen, count) if count > 0 else []
            self._drafted += len(drafts[slot])
        self._step.set_drafts(drafts)
        return drafts

    def _accept(self, generation: Generation, token: int, sampled: Sampled, place: tuple[int, int]) -> str | None:
        """Add a new token, that of `place` [slot, t], to a request; returns why it ends the output, if it does."""
        if token == FAILED:
            generation.error = NOT_FINITE.format(len(generation.seen))
            return "failed"
        request = generation.request
        generation.seen.append(token)
        self._new_tokens += 1
        wanted = request.sampling.logprobs
        if wanted is not None and sampled.logprobs is not None:
            assert sampled.top_tokens is not None
            assert sampled.top_logprobs is not None
            top = zip(sampled.top_tokens[place][:wanted].tolist(), sampled.top_logprobs[place][:wanted].tolist())
            generation.logprobs.append(TokenLogprobs(float(sampled.logprobs[place]), dict(top)))
        ended = not request.ignore_eos and token == self.model.config.eos_token_id
        if ended or token in request.stop_tokens:
            return "stop_token"
        if generation.stops is not None:
            try:
                matched = generation.stops.push(token)
            except Exception as error:  # of the caller's `decode`: the others' tokens must not be lost with it
                generation.error = f"its text cannot be decoded: {error!r}"
                return "failed"
            if matched is not None:
                return "stop_string"
        if request.max_new_tokens is not None and generation.num_new >= request.max_new_tokens:
            return "length"
        return None

    def _fail(self, generation: Generation, error: str) -> None:
        generation.error = error
        self._finish(generation, "failed")

    def _finish(self, generation: Generation, reason: str) -> None:
        if generation.stops is not None and reason != "failed":
            generation.stops.flush()
        if generation.status is Status.WAITING:
            self._waiting.remove(generation)
        elif generation.status is Status.READING:
            self._reading.remove(generation)
        elif generation.slot is not None:
            if reason != "failed":
                if generation.request.keep_state:
                    generation.snapshot = self.snapshot(generation)
                self._keep_prefix(generation)
            del self._decoding[generation.slot]
            self._parts = None
            self._step.active[generation.slot] = False
        if generation.slot is not None:
            self._lookups.pop(generation.slot, None)
            self.pool.release(generation.slot)
        generation.slot, generation.status, generation.finish_reason = None, Status.FINISHED, reason


def _fits(state: ModelState, slots: ModelState) -> bool:
    """Whether a sequence's state is one of the model that `slots` are of; caches may hold any number of tokens."""
    if [type(layer) for layer in state] != [type(layer) for layer in slots]:
        return False
    for mine, theirs in zip(state, slots, strict=True):
        for name, x in theirs.tensors().items():
            shape, found = list(x.shape), list(mine.tensors()[name].shape)
            if name in theirs.PER_TOKEN:
                shape[1:2], found[1:2] = [], []
            if found != [1, *shape[1:]]:
                return False
    return True


def _check_deferred_writes(length: int, speculation: Speculation | None) -> None:
    if length not in (0, *RINGS):
        raise ValueError(f"deferred_writes is {length}; accepted: 0, {', '.join(map(str, RINGS))}")
    if length and speculation is not None:
        raise ValueError(
            f"deferred_writes is {length} with speculation, which keeps its drafts' rows itself; accepted: either one"
        )


def _use_graphs(asked: bool | None, model: LanguageModel, device: torch.device) -> bool:
    on_gpu = device.type == "cuda"
    routed = next((i for i, block in enumerate(model.layers) if isinstance(block.feed_forward, MoE)), None)
    if asked and not on_gpu:
        raise ValueError(f"graphs is True for a model on {device}; accepted there: False or None")
    if asked and routed is not None:
        raise ValueError(
            f"graphs is True and layer {routed} is a mixture of experts, whose shapes depend on what it routes; "
            "accepted: False or None"
        )
    return on_gpu and routed is None if asked is None else asked
