"""Keywords of a call that are not arguments of `forward`: what transformers and its tokenizers pass to any model.

Each is understood, or ignored where its value changes nothing for this model. Any other keyword is refused, because a
misspelled mask that goes unread would change every result.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from retnet.models.hf.cache import StateCache
from retnet.system.suggest import nearest

# Arguments of transformers' loss.
LOSS = ("num_items_in_batch", "shift_labels", "ignore_index")
# Bounds that other kernels need, what `generate` needs itself, and a tokenizer's notes about the text.
_IGNORED = (
    "max_length_q", "max_length_k", "tokenizer", "assistant_tokenizer", "special_tokens_mask", "offset_mapping",
    "length", "num_truncated_tokens", "overflowing_tokens", "overflow_to_sample_mapping",
)  # fmt: skip
_FALSE = ("output_attentions", "output_router_logits")
_CHECKED = (*_FALSE, "is_causal", "token_type_ids", "cu_seq_lens_k", "cache_position")


class UnknownKeyword(TypeError, ValueError):
    """A keyword that no argument has: a TypeError as in any Python function, a ValueError as for other arguments."""


def loss_keywords(
    model: nn.Module, given: dict[str, Any], length: int, cache: StateCache | None, cu_seq_lens_q: Tensor | None
) -> dict[str, Any]:
    """The arguments of the loss among `given`, the keywords of a call that are not arguments of the model's `forward`.

    length: T of the call.

    Raises UnknownKeyword for a name that is not known, and ValueError for a value that this model cannot honour.
    """
    for name, value in given.items():
        if value is None or name in LOSS or name in _IGNORED:
            continue
        if name in _FALSE:
            if value is not False:
                raise ValueError(f"{name} is {value}; accepted: False, as these are not returned")
        elif name == "is_causal":
            if value is not True:
                raise ValueError(f"is_causal is {value}; accepted: True, as states read from left to right")
        elif name == "token_type_ids":
            if not _compiling() and bool(torch.as_tensor(value).any()):
                raise ValueError("token_type_ids holds values other than 0; accepted: 0, as there are no token types")
        elif name == "cu_seq_lens_k":
            if cu_seq_lens_q is None or (not _compiling() and not torch.equal(value, cu_seq_lens_q)):
                raise ValueError("cu_seq_lens_k differs from cu_seq_lens_q; accepted: the same, or cu_seq_lens_q alone")
        elif name == "cache_position":
            seen = 0 if cache is None or _compiling() else cache.get_seq_length()
            if not _compiling() and torch.as_tensor(value).tolist() != list(range(seen, seen + length)):
                raise ValueError(f"cache_position is {value}; accepted: {seen} to {seen + length - 1}")
        else:
            _refuse(type(model), name)
    return {name: x for name, x in given.items() if name in LOSS and x is not None}


def _refuse(model: type[nn.Module], name: str) -> None:
    """Raise UnknownKeyword with the nearest name that a call of the model accepts."""
    arguments = [
        p.name for p in inspect.signature(model.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    accepted = sorted({*arguments, *LOSS, *_IGNORED, *_CHECKED} - {"self"})
    near = nearest(name, accepted)
    hint = f"did you mean {near!r}? " if near else ""
    raise UnknownKeyword(f"{name} is no keyword of {model.__name__}; {hint}Accepted: {', '.join(accepted)}")


def _compiling() -> bool:
    return torch.compiler.is_compiling()
