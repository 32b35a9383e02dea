"""`RetNetForSequenceClassification` and `RetNetForTokenClassification`: a linear head on the body.

Weights have the names of the other classes, so a directory opens as any of them: `score.weight` is the head's, and a
language model's own head is left out. transformers reports both when it loads.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast, TokenClassifierOutput

from retnet.models.decode.decoder import running
from retnet.models.hf.body import Body, HiddenStates, RetNetModel
from retnet.models.hf.cache import StateCache
from retnet.models.hf.config import RetNetConfig
from retnet.models.hf.inputs import IGNORED, Tokens
from retnet.models.lm import LanguageModel

_ONE_LABEL = "single_label_classification"


class _Classifier(RetNetModel):
    """A body and `score`: final hidden states [..., D] -> logits [..., num_labels]."""

    _tied_weights_keys = {}  # noqa: RUF012 (as transformers types it)

    def __init__(self, config: RetNetConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model.head = None  # type: ignore[assignment] (unused weights: distributed training refuses them)
        self.score = nn.Linear(config.hidden_size, len(config.id2label or ()), bias=False)
        self.post_init()

    @classmethod
    def wrap(cls, model: LanguageModel) -> NoReturn:
        """Not for classifiers, whose language model has no head."""
        raise TypeError(
            f"{cls.__name__} wraps no language model; accepted: from_pretrained of a directory, or a config"
        )

    def _run(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        cache: StateCache | None,
        marks: tuple[Tensor | None, ...],
        labels: Tensor | None,
        use_cache: bool | None,
        output_hidden_states: HiddenStates,
        keywords: dict[str, Any],
    ) -> tuple[Tokens, Body, Tensor | None, Tensor | int | None]:
        """The tokens, what the layers return, the losses of routers in training, and the keyword num_items_in_batch."""
        attention_mask, position_ids, cu_seq_lens_q, seq_idx = marks
        tokens = self._tokens(input_ids, inputs_embeds, cache, attention_mask, position_ids, cu_seq_lens_q, seq_idx)
        for_loss = self._loss_keywords(keywords, tokens, cache, cu_seq_lens_q)
        items = for_loss.pop("num_items_in_batch", None)
        if for_loss:
            raise ValueError(f"{', '.join(for_loss)} given to {type(self).__name__}; accepted: labels alone")
        if use_cache is None and cache is None and labels is not None:
            use_cache = False
        losses: list[Tensor] | None = [] if self.training and labels is not None else None
        with nullcontext() if torch.compiler.is_compiling() else running(self.model):
            body = self._body(tokens, input_ids, inputs_embeds, cache, use_cache, output_hidden_states, losses)
        return tokens, body, torch.stack(losses).sum() if losses else None, items

    def _loss(self, logits: Tensor, labels: Tensor, extra: Tensor | None, items: Tensor | int | None) -> Tensor:
        """transformers' loss of the labels that are not -100, as a mean over `items`, plus that of routers.

        items: labels of the whole optimizer step, if it is accumulated over several batches.
        """
        logits, count = logits.float(), (labels != IGNORED).sum()
        if self.loss_type == "ForSequenceClassification" and self._problem_type(labels) != _ONE_LABEL:
            labels = labels.to(logits.device, logits.dtype)
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
            loss = loss if items is None else loss * (count / items)
        else:
            over = count.clamp_min(1) if items is None else items  # a mean over no label would be NaN
            given = {"labels": labels, "config": self.config, "num_items_in_batch": over}
            loss = self.loss_function(logits=logits, pooled_logits=logits, **given)
        return loss if extra is None else loss + (extra if items is None else extra * (count / items))

    def _problem_type(self, labels: Tensor) -> str:
        """The configuration's, which the dtype of the first labels decides if it is None, as in transformers."""
        if self.config.problem_type is None:
            floats = "multi_label_classification" if labels.is_floating_point() else _ONE_LABEL
            self.config.problem_type = "regression" if self.num_labels == 1 else floats
        return self.config.problem_type


class RetNetForSequenceClassification(_Classifier):
    """Labels of whole texts, read from the last real token of each."""

    def __init__(self, config: RetNetConfig):
        super().__init__(config)
        self.loss_type = "ForSequenceClassification"  # by name, a subclass might have none

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: HiddenStates = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple:
        """Logits [B, num_labels], or [N, num_labels] for N packed documents; with labels, the loss.

        Arguments as for `RetNetForCausalLM.forward`, except:
            attention_mask: [B, T]; the last 1 of a row is its last real token. None: the last token that is not
                `config.pad_token_id`, as in transformers; without such an id the last token.
            labels: [B] (or [N]) int64 classes; [B, num_labels] 0 or 1 for several labels; floats [B] or
                [B, num_labels] for a regression (`config.problem_type`). The class -100 is ignored.

        Raises ValueError for a row or document without a real token, and for labels of another number.
        """
        marks = (attention_mask, position_ids, cu_seq_lens_q, seq_idx)
        tokens, body, extra, items = self._run(
            input_ids, inputs_embeds, past_key_values, marks, labels, use_cache, output_hidden_states, kwargs
        )
        pads = None
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            pads = input_ids == self.config.pad_token_id
        logits = self.score(_last_real(body.hidden, tokens, pads))
        loss = None
        if labels is not None:
            if labels.shape[:1] != logits.shape[:1]:
                raise ValueError(
                    f"labels have shape {list(labels.shape)} for {len(logits)} texts; accepted: one entry per text"
                )
            loss = self._loss(logits, labels, extra, items)
        output = SequenceClassifierOutputWithPast(
            loss=loss,  # type: ignore[arg-type]
            logits=logits,
            past_key_values=body.cache,
            hidden_states=body.hidden_states,  # type: ignore[arg-type]
        )
        return self._returned(output, return_dict)


class RetNetForTokenClassification(_Classifier):
    """A label for every token, which has read the tokens before it and none after it."""

    def __init__(self, config: RetNetConfig):
        super().__init__(config)
        self.loss_type = "ForTokenClassification"

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: HiddenStates = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput | tuple:
        """Logits [B, T, num_labels] and, with labels [B, T] int64 (-100 is ignored), the loss.

        Other arguments as for `RetNetForCausalLM.forward`. The states of a call are in `past_key_values`, if it was
        given.
        """
        marks = (attention_mask, position_ids, cu_seq_lens_q, seq_idx)
        use_cache = past_key_values is not None if use_cache is None else use_cache
        _, body, extra, items = self._run(
            input_ids, inputs_embeds, past_key_values, marks, labels, use_cache, output_hidden_states, kwargs
        )
        logits = self.score(body.hidden)
        if labels is not None and labels.shape != logits.shape[:2]:
            raise ValueError(f"labels have shape {list(labels.shape)}; accepted: {list(logits.shape[:2])}")
        loss = None if labels is None else self._loss(logits, labels, extra, items)
        output = TokenClassifierOutput(
            loss=loss,  # type: ignore[arg-type]
            logits=logits,
            hidden_states=body.hidden_states,  # type: ignore[arg-type]
        )
        return self._returned(output, return_dict)


def _last_real(hidden: Tensor, tokens: Tokens, pads: Tensor | None) -> Tensor:
    """The hidden state [N, D] of each text's last real token, from [B, T, D].

    pads: [B, T], in place of a mask. A row of nothing else has its last token read.
    """
    if tokens.bounds is not None:
        if not torch.compiler.is_compiling() and bool((tokens.bounds.diff() < 1).any()):
            raise ValueError("a packed document is empty; accepted: at least one token in each")
        return hidden.flatten(0, 1)[tokens.bounds[1:].long() - 1]
    real = tokens.mask
    if real is not None and not torch.compiler.is_compiling() and not bool(real.any(1).all()):
        rows = (~real.any(1)).nonzero().flatten().tolist()
        raise ValueError(f"attention_mask has no real token in rows {rows}; accepted: at least one in each")
    if real is None and pads is not None:
        real = ~pads | pads.all(1, keepdim=True)
    if real is None:
        return hidden[:, -1]
    columns = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, columns, -1).amax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]
