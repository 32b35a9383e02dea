"""The decode step with sampling: every slot reads its last token and picks the next one, in fixed shapes and in place.

Slots without a running request are masked: they neither decay nor write. On a GPU the whole step, with sampling and the
copy of its results to pinned memory, is captured as one CUDA graph per set of sampling parts in use, so that a token
costs one launch and one wait. On a CPU it runs eagerly: reading the weights takes far longer than Python's overhead.
"""

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor

from retnet.layers.state import LayerState, TokenCache
from retnet.models.decode.fused import FusedModel
from retnet.models.decode.sampling import Sampled, SamplingParts, SamplingTable
from retnet.models.lm import LanguageModel
from retnet.models.states import ModelState
from retnet.ops.decode.ring import Ring

WARM_UP_RUNS = 3  # before a capture: kernels compile, libraries allocate
FAILED = -1  # in place of a token: the logits held NaN or infinity


class DecodeStep:
    """Decodes all slots of `state`, whose tensors are overwritten and never move.

    tokens [S]: the last token of each slot, not read yet. active [S] bool: slots that take part. On a GPU it is called
    with the model's device current, as the engine does. launched: called when a step is about to wait for its results;
    it raises nothing.
    """

    def __init__(
        self,
        model: LanguageModel,
        state: ModelState,
        table: SamplingTable,
        graphs: bool,
        deferred: Sequence[Ring | None] | None = None,
    ):
        self.model, self.state, self.table, self.graphs, self.deferred = model, state, table, graphs, deferred
        self._fused = FusedModel(model)  # packed here: prompts are read with the same weights
        self._made_for = model.embedding.weight.device, model.embedding.weight.dtype
        device = state.position.device
        self.tokens = torch.zeros(len(state.position), dtype=torch.long, device=device)
        self.active = torch.zeros_like(self.tokens, dtype=torch.bool)
        self.launched: Callable[[], None] = lambda: None
        self._captured: dict[tuple[str, SamplingParts], tuple[torch.cuda.CUDAGraph, Sampled]] = {}
        self._memory = torch.cuda.graph_pool_handle() if graphs else None

    @property
    def is_current(self) -> bool:
        """Whether the model still has the modules, hooks and places of weights that were packed."""
        return self._fused.is_current

    def check_fits(self) -> None:
        """Raise ValueError if the model has moved to another device or dtype than its states."""
        weight = self.model.embedding.weight
        if (weight.device, weight.dtype) != self._made_for:
            raise ValueError(
                f"the model is {weight.dtype} on {weight.device} now; accepted: {self._made_for[1]} on "
                f"{self._made_for[0]} as when the engine was made, or a new engine"
            )

    def repack(self) -> None:
        """Pack the weights as they are now; steps are captured again when they are next needed."""
        self._captured.clear()
        self._fused = FusedModel(self.model)

    def __call__(self, parts: SamplingParts) -> Sampled:
        """One token [S, 1] per active slot, on the host; FAILED where there is none. Read it before the next call."""
        return self._result("step", self._run, parts, self.launched)

    def _result(
        self,
        name: str,
        run: Callable[[SamplingParts], Sampled],
        parts: SamplingParts,
        launched: Callable[[], None] = lambda: None,
    ) -> Sampled:
        """run(parts) on the host: replayed where graphs are in use, captured under `name` before its first use."""
        if not self.graphs:
            launched()
            return run(parts).each(Tensor.cpu)
        self._capture_if_new(name, run, parts)
        graph, on_host = self._captured[name, parts]
        graph.replay()
        launched()
        torch.cuda.current_stream().synchronize()
        return on_host

    @torch.no_grad()
    def capture(self, parts: SamplingParts) -> None:
        """Compile and capture the step ahead of use."""
        self._capture_if_new("step", self._run, parts)

    def _capture_if_new(self, name: str, run: Callable[[SamplingParts], Sampled], parts: SamplingParts) -> None:
        """Meanwhile all slots are masked, so that no request changes."""
        if (name, parts) in self._captured:
            return
        active = self.active.clone()
        try:
            self.active.zero_()
            self._captured[name, parts] = self._capture(run, parts)
        finally:  # otherwise the running requests would sample on and their states stand still
            self.active.copy_(active)

    def _capture(
        self, run: Callable[[SamplingParts], Sampled], parts: SamplingParts
    ) -> tuple[torch.cuda.CUDAGraph, Sampled]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS - 1):
                run(parts)
            sampled = run(parts)
        torch.cuda.current_stream().wait_stream(stream)
        for layer in chain.from_iterable(part.leaves for part in self.state.parts):
            if isinstance(layer, TokenCache):
                layer.filled = 0  # asking the device would break the capture; requests are kept within the room
        on_host = sampled.each(lambda x: torch.empty(x.shape, dtype=x.dtype, pin_memory=True))
        graph = torch.cuda.CUDAGraph()
        # On this stream: torch's default capture stream is one per process, on the GPU that captured first.
        with torch.cuda.graph(graph, pool=self._memory, stream=stream, capture_error_mode="thread_local"):
            sampled = run(parts)
            for here, there in zip(on_host, sampled, strict=True):
                if here is not None and there is not None:
                    here.copy_(there, non_blocking=True)
        return graph, on_host

    @torch.no_grad()
    def _run(self, parts: SamplingParts) -> Sampled:
        logits, _ = self._fused(self.tokens, self.state, self.active, self.deferred)
        return self._pick(logits, self.state.position, self.active, parts).each(lambda x: x[:, None])

    def _pick(
        self, logits: Tensor, position: Tensor, taking_part: Tensor, parts: SamplingParts, place: int = 0
    ) -> Sampled:
        """A token from logits [S, vocab]; it becomes the last one of the slots that are taking_part [S]. place: which
        of the step's tokens it is."""
        sampled = self.table.sample(logits, position, parts, place)
        if parts.edits:
            self.table.record(sampled.tokens, taking_part)
        self.tokens.copy_(torch.where(taking_part, sampled.tokens, self.tokens))
        largest = logits.amax(-1)  # NaN if any logit is
        return sampled._replace(tokens=sampled.tokens.masked_fill(~largest.isfinite(), FAILED))

    def read(self, slot: int, ids: Tensor) -> Tensor:
        """Let a slot read a chunk of a prompt [1, T]. Returns the final hidden states [T, D]."""
        before = self.state.slot(slot)
        hidden, after = self._fused.read(ids, before)
        write_back_(slot, self.state.layers, before.layers, after.layers)
        return hidden

    def settle(self, counts: list[int]) -> None:
        """Write what the first counts [S] tokens of the last call add to the states. Here they are written already."""


def write_back_(
    slot: int, states: Sequence[LayerState], before: Sequence[LayerState], after: Sequence[LayerState]
) -> None:
    """Write the states after a call into a slot. Those that are the views `before` it were updated in place."""
    for parts in zip(states, before, after, strict=True):
        for part, view, new in zip(*(state.leaves for state in parts), strict=True):
            if new is not view:
                part.write_(slot, new)
