"""The engine: requests join, run and leave at any step; token ids in, token ids out.

Each step admits waiting requests to free slots, reads chunks of prompts within a budget of tokens, and decodes one
token for every running request. Decoding always runs all slots, and prompts are read one at a time in chunks that end
at fixed places. A request's logits therefore have the same bits whatever else is in the batch. The last token of a
context is always read by a decode step, so that a snapshot, a cached prefix and a fork continue with the very tokens of
the request that they were taken from.

Experts of a mixture see as many tokens as chose them, so there a request's logits are equal up to rounding only. The
engine has one device; the server around it is in `serve/http/`.

A model that is split over processes (`models/parallel/plan.py`) has an engine in each of them. Their schedulers are the
same program: the same calls in the same order give the same steps, and only the sums of the layers, the logits and the
chosen tokens are exchanged. States, cached prefixes and snapshots hold the process's own heads.
"""

from collections import deque
from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from retnet.models.decode.sampling import SamplingParts, SamplingTable
from retnet.models.decode.step import DecodeStep
from retnet.models.lm import LanguageModel
from retnet.models.snapshot import Snapshot
from retnet.ops.device import own_modes
from retnet.serve.admission import Admission
from retnet.serve.constrained import GrammarFailed
from retnet.serve.decoding import Decoding
from retnet.serve.drafting import Drafter, LookupDrafter
from retnet.serve.options import (
    MOST,
    check_decode,
    check_in_evaluation_mode,
    check_model,
    check_speculation,
    checked_deferred_writes,
    counts,
    prompt_options,
    use_graphs,
)
from retnet.serve.pool import SlotPool
from retnet.serve.prefill import Prefill
from retnet.serve.prefix import PrefixCache
from retnet.serve.request import Generation, Request, Status
from retnet.serve.self_speculation import ModelDrafter, SelfVerifyStep
from retnet.serve.speculation import Speculation, VerifyStep
from retnet.serve.stages import Stages
from retnet.serve.stats import EngineStats
from retnet.serve.stopping import Decode
from retnet.serve.stream import TokenStream
from retnet.serve.turns import Turns
from retnet.serve.weights import WeightsWatch
from retnet.system.checks import quoted

P = ParamSpec("P")
R = TypeVar("R")
WEIGHTS_CHANGED = "the weights changed while it ran"


def _between_steps(call: "Callable[Concatenate[Engine, P], R]") -> "Callable[Concatenate[Engine, P], R]":
    """A method that reads or changes states: one runs at a time, and none inside a step."""

    @wraps(call)
    def alone(engine: "Engine", *args: P.args, **kwargs: P.kwargs) -> R:
        return engine._turns.take(lambda: engine._call(call, args, kwargs))

    return alone


class Engine:
    """Many generations over one model, in memory that is fixed at the start.

    Any thread may call any method. Calls run one after another: one that comes during a step waits for its end. The
    `decode` function runs inside a step: its `submit` is queued, its `cancel` takes effect at the step's end, and other
    calls from there raise RuntimeError. A call that is broken off by an exception or Ctrl-C fails the requests that it
    was working on, and leaves the others as they were.

    Weights that change in place make stored states worthless: call `weights_changed` then.

    Args:
        model: in evaluation mode, on its device; stacks with Hyena layers are refused. If it is split over processes,
            each of them makes an engine and calls the same methods in the same order.
        num_slots, memory_bytes: how many requests run at a time, or the memory that they may take; one of the two.
        max_tokens: context that a slot has room for: needed by attention without a window, and a limit for all
            requests.
        prompt_chunk: tokens of a prompt chunk, 256 on a CPU and 2048 on a GPU if None. Rounding depends on it, so
            engines that are to agree bit for bit need the same.
        prompt_budget: prompt tokens per step (at least one chunk is read), so that running requests keep their pace;
            one chunk if None.
        prefix_cache_bytes: memory for states where prompts part, and at the ends of prompts and conversations, so that
            common beginnings are read once; prefix_interval: also keep a state every so many tokens.
        max_waiting: requests that may wait for a slot (any number if None).
        decode: token ids to text; needed for stop strings. A tokenizer's own `decode` knows its unfinished characters.
        speculation: draft tokens from the context, or by the model's multi-token prediction, and check several per step
            (`serve/speculation.py`).
        deferred_writes: how many tokens retention states may lag behind; the last keys and values are read beside
            them. That nearly halves the memory traffic of states. 16, 32 or 64; 0 writes every token.
        graphs: capture decode steps as CUDA graphs. None: on a GPU, except for mixtures of experts, whose shapes depend
            on their routing.
    """

    @torch.inference_mode(False)
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
        check_model(model)
        num_slots, max_tokens = counts(high=MOST, num_slots=num_slots, max_tokens=max_tokens)
        memory_bytes, prefix_cache_bytes = counts(memory_bytes=memory_bytes, prefix_cache_bytes=prefix_cache_bytes)
        [max_waiting] = counts(low=0, max_waiting=max_waiting)
        device = model.embedding.weight.device
        chunk, budget, interval = prompt_options(device, prompt_chunk, prompt_budget, prefix_interval)
        check_decode(decode)
        check_speculation(speculation, model, max_tokens)
        deferred_writes = checked_deferred_writes(deferred_writes, speculation)
        captured = use_graphs(graphs, model)
        self.model = model
        self.pool = SlotPool(
            model,
            num_slots=num_slots,
            memory_bytes=memory_bytes,
            max_tokens=max_tokens,
            deferred_writes=deferred_writes,
            speculation=speculation,
        )
        width = 1 if speculation is None else speculation.draft_tokens + 1
        self.table = SamplingTable(self.pool.num_slots, model.config.vocab_size, device, width, model.shard)
        self.drafter: Drafter | None = None
        if speculation is None:
            self._step = DecodeStep(model, self.pool.state, self.table, captured, self.pool.deferred)
        elif speculation.uses_mtp:
            self._step = SelfVerifyStep(model, self.pool.state, self.table, captured, width)
            self.drafter = ModelDrafter(self._step)
        else:
            self._step = VerifyStep(model, self.pool.state, self.table, captured, width)
            self.drafter = LookupDrafter(speculation, self.pool.num_slots, max_tokens)
        self.prefixes = None if prefix_cache_bytes is None else PrefixCache(prefix_cache_bytes, chunk)
        self._weights = WeightsWatch(model, self._step)
        self._stages = Stages()
        self._turns = Turns()
        self._to_cancel: deque[Generation] = deque()
        self._broken_off_by = "an exception"
        self._admission = Admission(model, self.pool, decode, max_waiting)
        self._prefill = Prefill(
            self._step,
            self.pool,
            self._stages,
            self.drafter,
            self.prefixes,
            self._weights,
            chunk=chunk,
            budget=budget,
            prefix_interval=interval,
        )
        self._decoding = Decoding(self._step, self.pool, self._stages, self.drafter)
        self._num_steps = 0

    @property
    def fingerprint(self) -> str:
        """The model's fingerprint in snapshots."""
        return self._admission.fingerprint

    @property
    def idle(self) -> bool:
        return self._turns.take(self._is_idle)

    def _is_idle(self) -> bool:
        self._end_cancelled()
        return self._stages.empty

    def stats(self) -> EngineStats:
        return self._turns.take(self._stats)

    def _stats(self) -> EngineStats:
        self._end_cancelled()
        stages = self._stages
        return EngineStats(
            self.pool.num_slots,
            self.pool.cost,
            len(stages.in_slots),
            len(stages.reading),
            len(stages.waiting),
            sum(generation.unread for generation in (*stages.reading, *stages.waiting)),
            self._num_steps,
            self._prefill.num_tokens,
            self._decoding.num_new,
            self._decoding.num_drafted,
            self._decoding.num_accepted,
            None if self.prefixes is None else deepcopy(self.prefixes.counts),
        )

    @_between_steps
    def warmup(self, *samplings: SamplingParts) -> None:
        """Compile kernels and capture the steps for these sampling parts ahead of use (greedy decoding if none)."""
        for parts in samplings:
            if not isinstance(parts, SamplingParts):
                raise ValueError(
                    f"samplings has {quoted(parts)} in it; accepted: SamplingParts, such as sampling.parts"
                )
        for parts in samplings or (SamplingParts(),):
            if self._step.graphs:
                self._step.capture(parts)
            elif not self._stages.decoding:
                self._step(parts)

    def submit(self, request: Request, after: Snapshot | None = None) -> Generation:
        """Queue a request. It continues the snapshot `after`, if given, and its prompt may then be empty.

        Raises Refused for a request that this engine can never serve, and if too many requests wait.
        """
        return self._turns.take(lambda: self._submit(request, after))

    def _submit(self, request: Request, after: Snapshot | None) -> Generation:
        if not self._turns.inside_step:
            self._work(lambda: self._tidy(uses_states=after is not None))
        generation = self._admission.admit(request, after, len(self._stages.waiting))
        self._prefill.expect(generation)
        self._stages.waiting.append(generation)
        return generation

    def cancel(self, generation: Generation) -> None:
        """End a request, wherever it is; a finished one does not change. From `decode`: at the end of the step."""
        self._admission.check_owner(generation)
        self._to_cancel.append(generation)
        self._turns.take(self._settle_between_steps)

    @_between_steps
    def cut(self, generation: Generation) -> None:
        """End the output of a request that decodes at the tokens that it has, with finish_reason "length". Its state is
        kept if it was submitted with `keep_state`.

        Raises ValueError for a request in another stage.
        """
        self._admission.check_owner(generation)
        if generation.status is not Status.DECODING:
            raise ValueError(f"the request is {generation.status.value}; accepted: one that is decoding")
        self._finish(generation, "length")

    def cancel_soon(self, generation: Generation) -> None:
        """`cancel` that never waits and takes no lock, for event loops and finalizers. The step that runs ends the
        request, or the next call of the engine does."""
        self._admission.check_owner(generation)
        self._to_cancel.append(generation)

    @_between_steps
    def step(self) -> list[tuple[Generation, list[int]]]:
        """Admit requests, read prompts, decode once. Returns each request that got new tokens, with these tokens."""
        check_in_evaluation_mode(self.model)
        self._num_steps += 1
        self._admit()
        self._prefill.run(self._start_decoding, self._fail)
        new = self._decoding.run()
        self._finish_ended()
        return new

    def on_launch(self, call: Callable[[], None]) -> None:
        """Call `call` in every decode step, inside of it, before its results are waited for. On a GPU the host is idle
        from there on, so this is the time for work that would delay the launch. It must not raise, nor call the engine.
        """
        self._step.launched = call

    def run(self) -> None:
        """Step until every request has finished."""
        while not self.idle:
            self.step()

    def stream(self, request: Request, after: Snapshot | None = None) -> TokenStream:
        """The tokens of one request as they come, while other requests run beside it. Leaving the loop cancels it.

        Raises Refused at once, as `submit` does, and Failed in the loop if the request fails.
        """
        return TokenStream(self, self.submit(request, after))

    @_between_steps
    def snapshot(self, generation: Generation) -> Snapshot:
        """The state of a running request as a value: a copy that later steps do not change.

        Raises ValueError for a request without a slot. A finished request has a snapshot if it was submitted with
        `keep_state`.
        """
        self._admission.check_owner(generation)
        if generation.snapshot is not None:
            return generation.snapshot
        self._renew_if_changed()
        if generation.status is not Status.DECODING:
            raise ValueError(
                f"the request is {generation.status.value}; accepted: one that is decoding, or ended with keep_state"
            )
        return self._snapshot(generation)

    def check_snapshot(self, snapshot: Snapshot) -> None:
        """Raise Refused for a snapshot that this engine cannot continue."""
        self._turns.take(lambda: self._admission.check_snapshot(snapshot))

    def fork(self, generation: Generation, request: Request) -> Generation:
        """Continue from the current state of a request, which goes on too; `request` may have more prompt, or none."""
        return self.submit(request, self.snapshot(generation))

    @_between_steps
    def weights_changed(self) -> None:
        """Forget what was made with the old weights, after they were changed in place.

        Cached prefixes are dropped, running requests fail, snapshots of the old weights are refused from here on, and
        the fused step is packed anew. Requests that wait run with the new weights. The engine notices most changes by
        itself: of the modules whenever a request gets a slot, and of the values whenever a stored state is used or
        kept. It does not notice them between two tokens of a request.
        """
        self._renew()

    def _admit(self) -> None:
        """Give free slots to waiting requests."""
        stages = self._stages
        if not (stages.waiting and self.pool.num_free):
            return
        if not self._step.is_current:
            self._renew()
        for _ in range(min(len(stages.waiting), self.pool.num_free)):
            generation = stages.waiting[0]
            if generation.start is not None or self.prefixes is not None:
                self._renew_if_changed()
            stages.in_doubt = (generation,)
            stages.waiting.popleft()
            stale = self._admission.why_stale(generation.start)
            if stale is None:
                self._prefill.enter(generation)
            else:
                generation.fail(stale)
            stages.in_doubt = ()

    def _start_decoding(self, generation: Generation) -> None:
        assert generation.slot is not None
        self._decoding.start(generation)
        generation.status = Status.DECODING
        try:
            if generation.constraint is not None and generation.constraint.ended:
                reason = "grammar_end"
            elif generation.request.max_new_tokens == 0:
                reason = "length"
            else:
                return
        except GrammarFailed as error:
            self._fail(generation, str(error))
            return
        if self.pool.is_finite(self.pool.state.slot(generation.slot).trim()):  # no logits will tell
            self._finish(generation, reason)
        else:
            self._fail(generation, "its state is not finite after the prompt")

    def _snapshot(self, generation: Generation) -> Snapshot:
        assert generation.slot is not None
        state = self.pool.copy(generation.slot)
        error, output_start = generation.rounding_error, generation.counted_from
        return Snapshot(state, generation.seen, self.fingerprint, error, output_start, generation.initial)

    def _fail(self, generation: Generation, error: str) -> None:
        generation.error = error
        self._finish(generation, "failed")

    def _finish_ended(self) -> None:
        """Take the requests whose output has ended out of their slots."""
        ended = [(g, reason) for g in self._stages.decoding.values() if (reason := g.finish_reason) is not None]
        for generation, reason in ended:
            self._finish(generation, reason)

    def _finish(self, generation: Generation, reason: str) -> None:
        stages = self._stages
        stages.in_doubt = (generation,)
        if generation.stops is not None:
            generation.stops.flush()
        keeps_state = generation.status is Status.DECODING and generation.request.keep_state
        if keeps_state and reason != "failed" and self._weights.changed:
            reason, generation.error = "failed", WEIGHTS_CHANGED
        if generation.status is Status.DECODING and reason != "failed":
            if keeps_state:
                generation.snapshot = self._snapshot(generation)
            self._prefill.keep_prefix(generation)
        stages.remove(generation)
        slot = generation.slot
        if slot is not None:
            self._decoding.remove(slot)
            self.pool.release(slot)
        generation.finish(reason)
        stages.in_doubt = ()

    def _call(self, call: Callable[..., R], args: tuple, kwargs: dict[str, Any]) -> R:
        """Run a method that works on states and whose turn it is."""
        if self._turns.inside_step:
            raise RuntimeError(
                f"{call.__name__} was called by `decode`, inside a step, where states and tokens do not match; "
                "accepted there: submit and cancel"
            )
        return self._work(lambda: self._tidied(call, args, kwargs))

    def _work(self, do: Callable[[], R]) -> R:
        """Run `do`, which works on states, whatever modes of torch the caller has on.

        Each `with` and its body are one line, as in `turns.py`: the caller gets its modes back also after an exception
        from a debugger or a signal.
        """
        try:
            with own_modes(self._step.tokens): return self._turns.work(do)  # fmt: skip # noqa: E701
        finally:
            while self._to_cancel:  # dropped streams whose finalizer found the call at work, after its last tidying
                with own_modes(self._step.tokens): self._turns.work(self._settle)  # fmt: skip # noqa: E701

    def _tidied(self, call: Callable[..., R], args: tuple, kwargs: dict[str, Any]) -> R:
        self._tidy()
        try:
            return call(self, *args, **kwargs)
        except BaseException as error:
            self._broken_off_by = repr(error)
            raise
        finally:
            self._tidy()

    def _end_cancelled(self) -> None:
        if self._to_cancel:
            self._settle_between_steps()

    def _settle_between_steps(self) -> None:
        if not self._turns.inside_step:
            self._work(self._settle)

    def _settle(self) -> None:
        """Put in order what the last call left: requests in doubt, and ended or cancelled ones."""
        self._weights.look_again()
        if self._stages.in_doubt:
            self._drop_doubtful(f"a call of the engine was broken off while it ran: {self._broken_off_by}")
        self._finish_ended()
        while self._to_cancel:
            generation = self._to_cancel[0]
            if not generation.finished:
                self._finish(generation, "cancelled")
            self._to_cancel.popleft()

    def _tidy(self, uses_states: bool = False) -> None:
        """`_settle`, and what a change of the weights makes necessary, if it was noticed or if states are used."""
        noticed = self._weights.known_to_have_changed
        self._settle()
        if noticed or (uses_states and self._weights.changed):
            self._renew()

    def _drop_doubtful(self, error: str) -> None:
        stages = self._stages
        stages.drop_doubtful(error)
        sound = [generation.slot for generation in stages.in_slots if generation.slot is not None]
        self.pool.release_all_but(sound)
        self._decoding.keep_only(stages.decoding)
        stages.in_doubt = ()

    def _renew_if_changed(self) -> None:
        if self._weights.changed:
            self._renew()

    def _renew(self) -> None:
        """Make the engine one of the weights as they are."""
        self._step.check_fits()
        stages = self._stages
        stages.in_doubt = tuple(stages.in_slots)
        self._drop_doubtful(WEIGHTS_CHANGED)
        if self.prefixes is not None:
            self.prefixes.clear()
        self._admission.forget_fingerprint()
        self._step.repack()
        self._weights.accept()
