"""The decode step: every slot reads its last token and picks the next one, in fixed shapes and in place.

Slots without a running request are masked: they neither decay nor write. On a GPU the whole step, sampling included, is
one captured graph (one for each set of sampling parts in use): a token costs one launch and one small copy back. On a
CPU it runs as it is: weights are read from memory, and what Python adds is lost beside that.
"""

import torch
from torch import Tensor

from retnet.layers.state import TokenCache
from retnet.models.lm import LanguageModel
from retnet.models.states import ModelState
from retnet.serve.sampling import Parts, Sampled, SamplingTable

WARM_UP_RUNS = 3  # before a capture: kernels compile, libraries allocate


class DecodeStep:
    """tokens [S]: each slot's last token, not read yet. active [S] bool: slots that take part."""

    def __init__(self, model: LanguageModel, state: ModelState, table: SamplingTable, graphs: bool):
        self.model, self.state, self.table, self.graphs = model, state, table, graphs
        device = state.position.device
        self.tokens = torch.zeros(len(state.position), dtype=torch.long, device=device)
        self.active = torch.zeros_like(self.tokens, dtype=torch.bool)
        self._captured: dict[Parts, tuple[torch.cuda.CUDAGraph, Sampled]] = {}
        self._memory = torch.cuda.graph_pool_handle() if graphs else None

    @torch.no_grad()
    def __call__(self, parts: Parts) -> Sampled:
        """One token [S, 1] for every active slot, on the host."""
        if not self.graphs:
            sampled = self._run(parts)
        else:
            if parts not in self._captured:
                self.capture(parts)
            graph, sampled = self._captured[parts]
            graph.replay()
        return sampled.each(Tensor.cpu)

    @torch.no_grad()
    def capture(self, parts: Parts) -> None:
        """Compile and capture the step ahead. Nothing changes for running requests: all slots are masked meanwhile."""
        if parts in self._captured:
            return
        active = self.active.clone()
        self.active.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                self._run(parts)
        torch.cuda.current_stream().wait_stream(stream)
        for layer in self.state:
            if isinstance(layer, TokenCache):
                layer.filled = 0  # asking the device would break the capture; the engine keeps requests within the room
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            sampled = self._run(parts)
        self._captured[parts] = graph, sampled
        self.active.copy_(active)

    def _run(self, parts: Parts) -> Sampled:
        hidden, _ = self.model.hidden(
            self.tokens[:, None], self.state, mask=self.active[:, None], carry=True, in_place=True
        )
        sampled = self._pick(self.model.logits(hidden[:, 0]), self.state.position, self.active, parts)
        return sampled.each(lambda x: x[:, None])

    def _pick(self, logits: Tensor, position: Tensor, rows: Tensor, parts: Parts) -> Sampled:
        """A token from logits [S, vocab]; it becomes the last one of the slots in rows [S]."""
        sampled = self.table.sample(logits, position, parts)
        if parts.edits:
            self.table.record(sampled.tokens, rows)
        self.tokens.copy_(torch.where(rows, sampled.tokens, self.tokens))
        return sampled

    def settle(self, counts: Tensor) -> None:
        """Nothing: what this step reads, it has written."""
