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
from retnet.eval.processes import ALONE, Processes
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
_Context = tuple[int, ...]


@dataclass(frozen=True)
class _Read:
    """A context after prefill: the logits [1, vocab] after it, and the state."""

    logits: Tensor
    state: ModelState


@dataclass
class _Prefix:
    """The first `length` tokens of a context, read on from those of `before`, when they are needed."""

    length: int
    context: Sequence[int] = ()
    before: _Prefix | None = None
    read: _Read | None = None


class RetNetLM(TemplateLM):
    """pretrained: a saved directory, preset or stack; or a model, which remembers its directory.

    tokenizer: in place of the model's own; of transformers or ours.
    add_bos_token: put the document start before contexts, or not; as the tokenizer does if None.
    processes: share the requests. Results, their order and their bits are those of one process, in every process.
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
        processes: Processes = ALONE,
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
        self.processes, self.tokens_read = processes, 0

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The document start: what stands before a text without context."""
        bos = self.tokenizer.bos_token_id
        start = self.tokenizer.eos_token_id if bos is None else bos
        if start is None:
            raise ValueError(
                "the tokenizer has no bos and no eos token, and one must stand before a text without context"
            )
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
        contexts = sorted(by_context)

        def scored(share: range) -> list[list[tuple[float, bool]]]:
            found = []
            for context, read in self._read_all(contexts, share):
                answers = [requests[i][2] for i in by_context[context]]
                batches = (answers[begin : begin + ROWS] for begin in range(0, len(answers), ROWS))
                found.append([result for batch in batches for result in self._score_answers(read, batch)])
            return found

        costs = [len(context) + sum(len(requests[i][2]) for i in by_context[context]) for context in contexts]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for context, answers in zip(contexts, self.processes.run(costs, scored), strict=True):
            for i, (nats, greedy) in zip(by_context[context], answers, strict=True):
                results[i] = nats, greedy
        return results

    def _read_all(
        self, contexts: Sequence[tuple[int, ...]], share: range
    ) -> Iterator[tuple[tuple[int, ...], _Read | None]]:
        """Prefill the sorted contexts of a share; a prefix shared with the previous one is read once.

        Where a context is cut into prefixes depends on all contexts, so that its bits are those of one process.
        """
        shared = [_common_prefix(a, b) for a, b in pairwise(contexts)]
        kept = [_Prefix(0)]  # prefixes of the latest context that later ones share
        for i, context in enumerate(contexts[: share.stop]):
            while i and kept[-1].length > shared[i - 1]:
                kept.pop()
            ends = {len(context)}
            for with_later in accumulate(shared[i:], min):
                if with_later <= kept[-1].length:
                    break
                ends.add(with_later)
            for end in sorted(ends):
                if end > kept[-1].length:
                    kept.append(_Prefix(end, context, kept[-1]))
            if i in share:
                yield context, self._read(kept[-1])

    def _read(self, prefix: _Prefix) -> _Read | None:
        """The prefix after prefill, which reads what has not been read of it; None for a prefix without tokens."""
        unread, rest = [], prefix
        while rest is not None and rest.read is None and rest.length:
            unread.append(rest)
            rest = rest.before
        for part in reversed(unread):
            begin, before = (part.before.length, part.before.read) if part.before else (0, None)
            tokens = torch.tensor([part.context[begin : part.length]], device=self._place)
            self.tokens_read += tokens.shape[1]
            part.read = _Read(*prefill(self.model, tokens, None if before is None else before.state))
        return prefix.read

    @torch.no_grad()
    def _score_answers(self, read: _Read | None, answers: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is the greedy answer) of every answer after one context."""
        assert read is not None
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

        def scored(request: Instance) -> float:
            ids = [self.prefix_token_id, *self.tok_encode(request.args[0], add_special_tokens=False)]
            return -score(self.model, torch.tensor([ids], device=self._place))[0].double().sum().item()

        costs = [len(request.args[0]) for request in requests]
        return self.processes.run(costs, lambda share: [scored(requests[i]) for i in share])

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations. A context is shared but for its last token, which `generate` reads."""
        by_context: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for i, request in enumerate(requests):
            *context, last = self.tok_encode(request.args[0]) or [self.prefix_token_id]
            by_context.setdefault(tuple(context), []).append((i, last))
        contexts = sorted(by_context)
        seed = torch.initial_seed()

        def continued(share: range) -> list[list[str]]:
            options = [cast(Any, request.args)[1] for request in requests]
            return [
                [self._continue(read, last, options[i], seed + i) for i, last in by_context[context]]
                for context, read in self._read_all(contexts, share)
            ]

        costs = [len(context) + MAX_GENERATED * len(by_context[context]) for context in contexts]
        results = [""] * len(requests)
        for context, texts in zip(contexts, self.processes.run(costs, continued), strict=True):
            for (i, _), text in zip(by_context[context], texts, strict=True):
                results[i] = text
        return results

    def _continue(self, read: _Read | None, last: int, options: dict[str, Any], seed: int) -> str:
        """Text after a context and its last token, up to the first of the strings `until`, which is left out.

        seed: of the random numbers of this request, which do not depend on the requests before it.

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
            state=None if read is None else read.state,
            temperature=float(options.get("temperature", 0.0)) if options.get("do_sample") is not False else 0.0,
            top_k=options.get("top_k"),
            top_p=options.get("top_p"),
            min_p=options.get("min_p"),
            generator=torch.Generator().manual_seed(seed % 2**63),
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
    """`lm_eval.simple_evaluate`; options are its own (num_fewshot, limit). Raises ValueError for unknown tasks.

    With several processes, each prepares all requests, and the model shares them: the harness sees one process. The
    results are in the first process; the others get {}.
    """
    manager = TaskManager() if task_manager is None else task_manager
    for name in tasks:
        if isinstance(name, str) and name not in manager.all_tasks and not Path(name).is_file():
            accepted = "a task, group or tag of the harness or of the folder given, or a YAML file"
            raise ValueError(f"no task {name!r}; accepted: {accepted}{did_you_mean(name, manager.all_tasks)}")
    if not model.processes.is_first:
        options |= {"bootstrap_iters": 0, "log_samples": False}
    found = cast(Any, lm_eval.simple_evaluate)(model=model, tasks=list(tasks), task_manager=manager, **options)
    return found if model.processes.is_first else {}


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))


register_model("retnet")(RetNetLM)
