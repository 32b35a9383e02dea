"""Adapter for lm-evaluation-harness, registered as "retnet": requests that share a context share its state.

The context of a multiple-choice question is read once for all its answers, few-shot examples are read once for all
questions that begin with them, and a document of any length is one context. Needs the extra `eval`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, takewhile
from typing import Any, cast

import lm_eval
import lm_eval.models  # before ours is registered: the harness registers its own on import
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from torch import Tensor

from retnet.data import Tokenizer
from retnet.models.decode.generation import generate, prefill
from retnet.models.lm import LanguageModel
from retnet.models.log_likelihood import score
from retnet.models.states import ModelState
from retnet.ops.dtypes import resolve_dtype
from retnet.stack.resolve import resolve_model, tokenizer_of

MAX_GENERATED = 256  # tokens, if a task gives no limit
ROWS = 64  # answers scored at a time


@dataclass(frozen=True)
class _Read:
    """A context after prefill: its length in tokens, the logits [1, vocab] after it, and the state."""

    length: int
    logits: Tensor | None
    state: ModelState | None


class RetNetLM(TemplateLM):
    """pretrained: a saved directory, preset or stack; or a model with its tokenizer.

    tokens_read: tokens that went through the model as context; fewer than in the requests where prefixes are shared.
    """

    def __init__(
        self,
        pretrained: str | LanguageModel,
        tokenizer: Tokenizer | None = None,
        device: str = "auto",
        dtype: str | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        unknown = set(kwargs) - {"batch_size", "max_batch_size"}  # the harness always gives these
        if unknown:
            raise ValueError(f"unknown model_args: {', '.join(sorted(unknown))}; accepted: pretrained, device, dtype")
        if isinstance(pretrained, str):
            model = resolve_model(pretrained, device=device, dtype=resolve_dtype(dtype))
            tokenizer = tokenizer or tokenizer_of(model.config, model.directory)
        else:
            model = pretrained
        if tokenizer is None:
            raise ValueError("a model in memory has no tokenizer; accepted with it: tokenizer=...")
        self.model, self._text, self.tokens_read = model.eval(), tokenizer, 0

    @property
    def eot_token_id(self) -> int:
        return self._text.document_start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._text.encode(string, start=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        by_context: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, _) in enumerate(requests):
            by_context.setdefault(tuple(context), []).append(i)
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for context, read in self._read_all(sorted(by_context)):
            indices = by_context[context]
            for begin in range(0, len(indices), ROWS):
                batch = indices[begin : begin + ROWS]
                for i, result in zip(batch, self._score_answers(read, [requests[i][2] for i in batch])):
                    results[i] = result
        return results

    def _read_all(self, contexts: Sequence[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], _Read]]:
        """Prefill sorted contexts; a prefix shared with the previous one is read once."""
        shared = [_common_prefix(a, b) for a, b in pairwise(contexts)]
        kept = [_Read(0, None, None)]  # prefixes of the latest context that later ones share
        for i, context in enumerate(contexts):
            while i and kept[-1].length > shared[i - 1]:
                kept.pop()
            ends = {len(context)}
            for with_later in accumulate(shared[i:], min):
                if with_later <= kept[-1].length:
                    break
                ends.add(with_later)
            for end in sorted(ends):
                if end > kept[-1].length:
                    kept.append(self._read(kept[-1], context, end))
            yield context, kept[-1]

    def _read(self, before: _Read, context: Sequence[int], end: int) -> _Read:
        tokens = torch.tensor([context[before.length : end]], device=self._place)
        self.tokens_read += tokens.shape[1]
        return _Read(end, *prefill(self.model, tokens, before.state))

    @torch.no_grad()
    def _score_answers(self, read: _Read, answers: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is the greedy answer) of every answer after one context."""
        assert read.logits is not None
        assert read.state is not None
        longest = max(map(len, answers))
        ids = torch.zeros(len(answers), longest, dtype=torch.int64, device=self._place)
        real = torch.zeros_like(ids, dtype=torch.bool)
        for row, answer in enumerate(answers):
            ids[row, : len(answer)] = torch.tensor(answer)
            real[row, : len(answer)] = True
        logits = read.logits.expand(len(answers), -1)[:, None]
        if longest > 1:
            state = read.state.repeat(len(answers))
            rest = self.model(ids[:, :-1], state, mask=real[:, :-1], carry=True).logits
            logits = torch.cat([logits, rest], 1)
        nats = logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        greedy = ((logits.argmax(-1) == ids) | ~real).all(1)
        return list(zip(nats.masked_fill(~real, 0).double().sum(1).tolist(), greedy.tolist()))

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole documents, each one context of any length."""
        totals = []
        for request in requests:
            text: str = request.args[0]
            ids = torch.tensor([self.tok_encode(text)], device=self._place)
            totals.append(-score(self.model, ids)[0].double().sum().item())
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations. A context is shared but for its last token, which `generate` reads."""
        results = [""] * len(requests)
        by_context: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for i, request in enumerate(requests):
            *context, last = self.tok_encode(request.args[0])
            by_context.setdefault(tuple(context), []).append((i, last))
        for context, read in self._read_all(sorted(by_context)):
            for i, last in by_context[context]:
                results[i] = self._continue(read, last, cast(Any, requests[i].args)[1])
        return results

    def _continue(self, read: _Read, last: int, options: dict[str, Any]) -> str:
        """Text after a context and its last token, up to the first of the strings `until`, which is left out."""
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        temperature = float(options.get("temperature", 0.0)) if options.get("do_sample", True) else 0.0
        longest = max(map(len, until), default=0)
        decoder, text = self._text.stream_decoder(), ""
        stream = generate(
            self.model,
            torch.tensor([[last]], device=self._place),
            int(options.get("max_gen_toks", MAX_GENERATED)),
            state=read.state,
            temperature=temperature,
            top_p=options.get("top_p"),
        )
        for token in stream:
            if int(token) == self._text.document_start:
                break
            before = max(0, len(text) - longest)  # where a string that ends in the new text may begin
            text += decoder.push(int(token))
            ends = [place for stop in until if stop and (place := text.find(stop, before)) >= 0]
            if ends:
                return text[: min(ends)]
        return text + decoder.flush()

    @property
    def _place(self) -> torch.device:
        return self.model.embedding.weight.device


def run_tasks(model: RetNetLM, tasks: Sequence[str | dict], **options: Any) -> dict[str, Any]:
    """`lm_eval.simple_evaluate`; options are its own (num_fewshot, limit, task_manager)."""
    return cast(Any, lm_eval.simple_evaluate)(model=model, tasks=list(tasks), **options)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))


register_model("retnet")(RetNetLM)
