"""The engine: requests join, run and leave at any step; token ids in, token ids out.

Each step admits waiting requests to free slots, reads chunks of prompts within a budget of tokens, and decodes one
token for every running request. Decoding always runs all slots, and prompts are read one at a time in chunks that end
at fixed places. A request's logits therefore have the same bits whatever else is in the batch. The last token of a
context is always read by a decode step, so that a snapshot, a cached prefix and a fork continue with the very tokens of
the request that they were taken from.

Left out: a server, and batching across devices. Experts of a mixture see as many tokens as chose them, so there a
request's logits are equal up to rounding only.
"""

from collections import deque
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch

from retnet.layers.moe import MoE
from retnet.models.decode.sampling import SamplingParts, SamplingTable
from retnet.models.decode.step import DecodeStep
from retnet.models.lm import LanguageModel
from retnet.ops.device import current_device_of
from retnet.serve.admission import Admission
from retnet.serve.decoding import Decoding
from retnet.serve.pool import SlotCost, SlotPool
from retnet.serve.prefill import Prefill
from retnet.serve.prefix import PrefixCache, PrefixCounts
from retnet.serve.request import Failed, Generation, Request, Status
from retnet.serve.snapshot import Snapshot
from retnet.serve.speculation import Drafter, Speculation, VerifyStep
from retnet.serve.stopping import Decode

# Prompt tokens per call. A GPU needs many to be busy; on a CPU running requests wait for them.
PROMPT_CHUNKS = {"cpu": 256, "cuda": 2048}
DEFERRED_WRITES = (16, 32, 64)  # lengths that tensor cores can sum over


@dataclass(frozen=True)
class EngineStats:
    """Counts of an engine. drafted, accepted: draft tokens, and those that were right. prefix: None without a cache."""

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
    """Many generations over one model, in memory that is fixed at the start.

    Args:
        model: in evaluation mode, on its device; stacks with Hyena layers are refused.
        num_slots, memory_bytes: how many requests run at a time, or the memory that they may take; one of the two.
        max_tokens: context that a slot has room for: needed by attention without a window, and a limit for all
            requests.
        prompt_chunk: tokens of a prompt chunk, 256 on a CPU and 2048 on a GPU if None. Rounding depends on it, so
            engines that are to agree bit for bit need the same.
        prompt_budget: prompt tokens per step (at least one chunk is read), so that running requests keep their pace;
            one chunk if None.
        prefix_cache_bytes: memory for the states of prompts' prefixes; prefix_interval: also keep a state every so many
            tokens inside them.
        max_waiting: requests that may wait for a slot (any number if None).
        decode: token ids to text; needed for stop strings.
        speculation: draft tokens from the context and check several per step (`serve/speculation.py`).
        deferred_writes: how many tokens retention states may lag behind; the last keys and values are read beside
            them. That nearly halves the memory traffic of states. 16, 32 or 64; 0 writes every token.
        graphs: capture decode steps as CUDA graphs. None: on a GPU, except for mixtures of experts, whose shapes depend
            on their routing.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        num_slots: int | None = None,
        memory_bytes: int | None = None,
        max_tokens: int | None = None,
        prompt_chunk: int | None = None,
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
        if prompt_chunk is None:
            prompt_chunk = PROMPT_CHUNKS.get(device.type, PROMPT_CHUNKS["cpu"])
        prompt_budget = prompt_chunk if prompt_budget is None else prompt_budget
        _check_prompt_options(prompt_chunk, prompt_budget, prefix_interval)
        if model.training:
            raise ValueError("the model is in training mode; accepted: evaluation mode (model.eval())")
        _check_deferred_writes(deferred_writes, speculation)
        if speculation is not None:
            speculation.check(model.config, max_tokens)
        self.model = model
        self.pool = SlotPool(
            model,
            num_slots=num_slots,
            memory_bytes=memory_bytes,
            max_tokens=max_tokens,
            deferred_writes=deferred_writes,
            draft_tokens=0 if speculation is None else speculation.draft_tokens,
        )
        self.table = SamplingTable(self.pool.num_slots, model.config.vocab_size, device)
        graphs = _use_graphs(graphs, model, device)
        if speculation is None:
            self._step = DecodeStep(model, self.pool.state, self.table, graphs, self.pool.deferred)
        else:
            width = speculation.draft_tokens + 1
            self._step = VerifyStep(model, self.pool.state, self.table, graphs, width)
        self.drafter = None if speculation is None else Drafter(speculation)
        self.prefixes = None if prefix_cache_bytes is None else PrefixCache(prefix_cache_bytes)
        self._admission = Admission(model, self.pool, decode, max_waiting)
        self._waiting: deque[Generation] = deque()
        self._prefill = Prefill(
            self._step,
            self.pool,
            self.drafter,
            self.prefixes,
            chunk=prompt_chunk,
            budget=prompt_budget,
            prefix_interval=prefix_interval,
        )
        self._decoding = Decoding(self._step, self.pool, self.drafter, model.config.eos_token_ids)
        self._num_steps = 0

    @property
    def fingerprint(self) -> str:
        """The model's fingerprint in snapshots."""
        return self._admission.fingerprint

    @property
    def idle(self) -> bool:
        return not (self._waiting or self._prefill.queue or self._decoding.running)

    def stats(self) -> EngineStats:
        return EngineStats(
            self.pool.num_slots,
            self.pool.cost,
            len(self._prefill.queue) + len(self._decoding.running),
            len(self._waiting),
            self._num_steps,
            self._prefill.num_tokens,
            self._decoding.num_new,
            0 if self.drafter is None else self.drafter.num_drafted,
            self._decoding.num_accepted,
            None if self.prefixes is None else deepcopy(self.prefixes.counts),
        )

    def warmup(self, *samplings: SamplingParts) -> None:
        """Compile kernels and capture the steps for these sampling parts ahead of use (greedy decoding if none)."""
        with current_device_of(self._step.tokens):
            for parts in samplings or (SamplingParts(),):
                if self._step.graphs:
                    self._step.capture(parts)
                elif not self._decoding.running:
                    self._step(parts)

    def submit(self, request: Request, after: Snapshot | None = None) -> Generation:
        """Queue a request. It continues the snapshot `after`, if given, and its prompt may then be empty.

        Raises Refused for a request that this engine can never serve, and if too many requests wait.
        """
        generation = self._admission.admit(request, after, len(self._waiting))
        self._waiting.append(generation)
        return generation

    def cancel(self, generation: Generation) -> None:
        """End a request at once, wherever it is; a finished one does not change."""
        self._admission.check_owner(generation)
        if not generation.finished:
            self._finish(generation, "cancelled")

    def step(self) -> list[tuple[Generation, list[int]]]:
        """Admit requests, read prompts, decode once. Returns each request that got new tokens, with these tokens."""
        self._num_steps += 1
        with current_device_of(self._step.tokens):
            while self._waiting and self.pool.num_free:
                generation = self._waiting.popleft()
                self._prefill.enter(generation)
                generation.status = Status.READING
            self._prefill.run(self._start_decoding, self._fail)
            progress = self._decoding.run(self._fail)
            for generation, reason in progress.ended:
                self._finish(generation, reason)
            return progress.new

    def run(self) -> None:
        """Step until every request has finished."""
        while not self.idle:
            self.step()

    def stream(self, request: Request, after: Snapshot | None = None) -> Iterator[int]:
        """The tokens of one request as they come, while other requests run beside it. Leaving the loop cancels it.

        Raises Refused at once, as `submit` does, and Failed in the loop if the request fails.
        """
        return self._stream(self.submit(request, after))

    def _stream(self, generation: Generation) -> Iterator[int]:
        sent = 0
        try:
            while not generation.finished or sent < generation.num_new:
                if sent == generation.num_new:
                    self.step()
                new = generation.seen[generation.output_start + sent :]  # also from steps that other callers took
                sent += len(new)
                yield from new
        finally:
            self.cancel(generation)
        if generation.error is not None:
            raise Failed(f"the request failed: {generation.error}")

    def snapshot(self, generation: Generation) -> Snapshot:
        """The state of a running request as a value: a copy that later steps do not change.

        Raises ValueError for a request without a slot. A finished request has a snapshot if it was submitted with
        `keep_state`.
        """
        self._admission.check_owner(generation)
        if generation.snapshot is not None:
            return generation.snapshot
        if generation.status is not Status.DECODING or generation.slot is None:
            raise ValueError(
                f"the request is {generation.status.value}; accepted: one that is decoding, or ended with keep_state"
            )
        state = self.pool.copy(generation.slot)
        return Snapshot(state, generation.seen[:], self.fingerprint, output_start=generation.counted_from)

    def fork(self, generation: Generation, request: Request) -> Generation:
        """Continue from the current state of a request, which goes on too; `request` may have more prompt, or none."""
        return self.submit(request, self.snapshot(generation))

    def _start_decoding(self, generation: Generation) -> None:
        self._decoding.start(generation)
        generation.status = Status.DECODING

    def _fail(self, generation: Generation, error: str) -> None:
        generation.error = error
        self._finish(generation, "failed")

    def _finish(self, generation: Generation, reason: str) -> None:
        if generation.stops is not None and reason != "failed":
            try:
                generation.stops.flush()
            except Exception as error:  # from the caller's `decode`
                generation.error, reason = f"its text cannot be decoded: {error!r}", "failed"
        if generation.status is Status.WAITING:
            self._waiting.remove(generation)
        elif generation.status is Status.READING:
            self._prefill.queue.remove(generation)
        else:
            if reason != "failed":
                if generation.request.keep_state:
                    generation.snapshot = self.snapshot(generation)
                self._prefill.keep_prefix(generation)
            self._decoding.remove(generation)
        if generation.slot is not None:
            if self.drafter is not None:
                self.drafter.leave(generation.slot)
            self.pool.release(generation.slot)
        generation.slot, generation.status, generation.finish_reason = None, Status.FINISHED, reason


def _check_prompt_options(prompt_chunk: int, prompt_budget: int, prefix_interval: int | None) -> None:
    for name, value in (("prompt_chunk", prompt_chunk), ("prompt_budget", prompt_budget)):
        if value < 1:
            raise ValueError(f"{name} is {value}; accepted: a positive integer")
    if prefix_interval is not None and (prefix_interval < 1 or prefix_interval % prompt_chunk):
        raise ValueError(f"prefix_interval is {prefix_interval}; accepted: a multiple of prompt_chunk ({prompt_chunk})")


def _check_deferred_writes(length: int, speculation: Speculation | None) -> None:
    if length not in (0, *DEFERRED_WRITES):
        raise ValueError(f"deferred_writes is {length}; accepted: 0, {', '.join(map(str, DEFERRED_WRITES))}")
    if length and speculation is not None:
        raise ValueError(
            f"deferred_writes is {length} with speculation, which defers its own writes; accepted: one of the two"
        )


def _use_graphs(asked: bool | None, model: LanguageModel, device: torch.device) -> bool:
    on_gpu = device.type == "cuda"
    routed = next((i for i, block in enumerate(model.layers) if isinstance(block.feed_forward, MoE)), None)
    if asked and not on_gpu:
        raise ValueError(f"graphs is True for a model on {device}; accepted there: False or None")
    if asked and routed is not None:
        raise ValueError(
            f"graphs is True and layer {routed} is a mixture of experts, whose shapes depend on its routing; accepted: "
            "False or None"
        )
    return on_gpu and routed is None if asked is None else asked
