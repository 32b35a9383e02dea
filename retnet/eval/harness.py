"""Adapter for lm-evaluation-harness, registered as "retnet": requests that share a context share its state.

The context of a multiple-choice question is read once for all its answers, few-shot examples are read once for all
questions that begin with them, and a document of any length is one context. Needs the extra `eval`.

Texts have the tokens that `--model hf` gives them: those of the tokenizer beside the weights, as transformers reads it.
One thing differs. Before a rolling document stands one document start; `--model hf` puts it before the one that the
tokenizer adds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, takewhile
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from retnet.system.extras import needs

with needs("eval", "A task of lm-evaluation-harness"):
    import lm_eval
    import lm_eval.models  # before ours is registered: the harness registers its own on import
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager

from retnet.data import Tokenizer
from retnet.data.tokenizer_json import TOKENIZER_FILE, JsonTokenizer
from retnet.models.decode.generation import generate, prefill
from retnet.models.hf.tokenizer import TransformersTokenizer, transformers_tokenizer
from retnet.models.lm import LanguageModel
from retnet.models.log_likelihood import score
from retnet.models.states import ModelState
from retnet.ops.dtypes import resolve_dtype
from retnet.stack.resolve import resolve_model, tokenizer_of
from retnet.system.suggest import choices, did_you_mean

MAX_GENERATED = 256  # tokens, if a task gives no limit
_LIMITS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # names of the limit; the first wins
_OPTIONS = ("until", "do_sample", "temperature", "top_k", "top_p", "min_p", *_LIMITS)
ROWS = 64  # answers scored at a time


@dataclass(frozen=True)
class _Read:
    """A context after prefill: its length in tokens, the logits [1, vocab] after it, and the state."""

    length: int
    logits: Tensor | None
    state: ModelState | None


class RetNetLM(TemplateLM):
    """pretrained: a saved directory, preset or stack; or a model, which remembers its directory.

    tokenizer: in place of the model's own; of transformers or ours.
    add_bos_token: put the document start before contexts, or not; as the tokenizer does if None.
    tokens_read: tokens that went through the model as context; fewer than in the requests where prefixes are shared.
    """

    tokenizer: Any  # of transformers

    def __init__(
        self,
        pretrained: str | LanguageModel,
        tokenizer: Tokenizer | TransformersTokenizer | None = None,
        device: str = "auto",
        dtype: str | None = None,
        add_bos_token: bool | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        unknown = set(kwargs) - {"batch_size", "max_batch_size"}  # the harness always gives these
        if unknown:
            accepted = ("pretrained", "device", "dtype", "add_bos_token")
            raise ValueError(f"unknown model_args: {', '.join(sorted(unknown))}; {choices(min(unknown), accepted)}")
        if isinstance(pretrained, str):
            pretrained = resolve_model(pretrained, device=device, dtype=resolve_dtype(dtype))
        if tokenizer is None or isinstance(tokenizer, Tokenizer):
            saved = None if tokenizer or not pretrained.directory else pretrained.directory / TOKENIZER_FILE
            ours = tokenizer or tokenizer_of(pretrained.config, pretrained.directory)
            file = ours.file if isinstance(ours, JsonTokenizer) else saved
            file = file if file and file.is_file() else None
            tokenizer = transformers_tokenizer(file, ours.document_start, ours.document_end, add_bos_token)
        self.model, self.tokenizer, self.add_bos_token = pretrained.eval(), tokenizer, add_bos_token
        self.tokens_read = 0

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The document start: what stands before a text without context."""
        bos = self.tokenizer.bos_token_id
        start = self.tokenizer.eos_token_id if bos is None else bos
        if start is None:
            raise ValueError("the tokenizer has neither a bos nor an eos token, to stand before a text without context")
        return start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text. One that begins with the document start is not given another."""
        if add_special_tokens is None:
            spelt = string.startswith(self.tokenizer.decode([self.prefix_token_id]))
            add_special_tokens = False if spelt else self.add_bos_token
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        by_context: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, _) in enumerate(requests):
            by_context.setdefault(tuple(context) or (self.prefix_token_id,), []).append(i)
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
            ids = [self.prefix_token_id, *self.tok_encode(request.args[0], add_special_tokens=False)]
            ids = torch.tensor([ids], device=self._place)
            totals.append(-score(self.model, ids)[0].double().sum().item())
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations. A context is shared but for its last token, which `generate` reads."""
        results = [""] * len(requests)
        by_context: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for i, request in enumerate(requests):
            *context, last = self.tok_encode(request.args[0]) or [self.prefix_token_id]
            by_context.setdefault(tuple(context), []).append((i, last))
        for context, read in self._read_all(sorted(by_context)):
            for i, last in by_context[context]:
                results[i] = self._continue(read, last, cast(Any, requests[i].args)[1])
        return results

    def _continue(self, read: _Read, last: int, options: dict[str, Any]) -> str:
        """Text after a context and its last token, up to the first of the strings `until`, which is left out.

        The tokenizer's end of text, as token and as text, is one of them; the model's tokens of that kind end it too.
        """
        unknown = [name for name, value in options.items() if name not in _OPTIONS and value is not None]
        if unknown:
            raise ValueError(f"generation_kwargs has {', '.join(unknown)}; accepted: {', '.join(_OPTIONS)}")
        stops, ends = self._stops(options.get("until") or []), {self.eot_token_id, *self.model.eos_token_ids}
        limit = next((options[name] for name in _LIMITS if options.get(name) is not None), MAX_GENERATED)
        stream = generate(
            self.model,
            torch.tensor([[last]], device=self._place),
            int(limit),
            state=read.state,
            temperature=float(options.get("temperature", 0.0)) if options.get("do_sample") is not False else 0.0,
            top_k=options.get("top_k"),
            top_p=options.get("top_p"),
            min_p=options.get("min_p"),
        )
        # A stop string is looked for in as many last tokens as it has, and two: it may be cut otherwise than alone.
        window = 2 + max((len(self.tok_encode(stop, add_special_tokens=False)) for stop in stops), default=0)
        tokens: list[int] = []
        for token in stream:
            tokens.append(int(token))
            tail = self.tokenizer.decode(tokens[-window:]) if stops else ""
            if tokens[-1] in ends or any(stop in tail for stop in stops):
                break
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        for stop in stops:
            text = text.split(stop)[0]
        return text

    def _stops(self, until: str | list[str]) -> list[str]:
        """The strings that end a text, the tokenizer's end of text among them."""
        stops = [until] if isinstance(until, str) else list(until)
        if self.eot_token_id is not None:
            stops.append(self.tokenizer.decode([self.eot_token_id]))
        return [stop for stop in dict.fromkeys(stops) if stop]

    @property
    def _place(self) -> torch.device:
        return self.model.embedding.weight.device


def run_tasks(
    model: RetNetLM, tasks: Sequence[str | dict], task_manager: TaskManager | None = None, **options: Any
) -> dict[str, Any]:
    """`lm_eval.simple_evaluate`; options are its own (num_fewshot, limit). Raises ValueError for unknown tasks."""
    manager = TaskManager() if task_manager is None else task_manager
    for name in tasks:
        if isinstance(name, str) and name not in manager.all_tasks and not Path(name).is_file():
            accepted = "a task, group or tag of the harness or of the folder given, or a YAML file"
            raise ValueError(f"no task {name!r}; accepted: {accepted}{did_you_mean(name, manager.all_tasks)}")
    return cast(Any, lm_eval.simple_evaluate)(model=model, tasks=list(tasks), task_manager=manager, **options)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))


register_model("retnet")(RetNetLM)
