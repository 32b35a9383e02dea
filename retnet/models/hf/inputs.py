"""Masks, positions and packed documents: from transformers' conventions to those of the core model.

transformers passes the mask of all tokens since the start, marks packed documents by positions that restart at 0 or by
`cu_seq_lens_q`, and gives padding positions too. The core model takes the mask of the current T tokens and the
boundaries of documents laid end to end, and counts real tokens itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Tokens:
    """The tokens [B, T] of a call: their mask [B, T], or the boundaries [N + 1] of documents laid end to end."""

    shape: tuple[int, int]
    mask: Tensor | None = None
    bounds: Tensor | None = None

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        cu_seq_lens: Tensor | None = None,
        seq_idx: Tensor | None = None,
        continued: bool = False,
    ) -> Tokens:
        """From transformers' inputs for tokens [B, T]; `continued`: they follow tokens whose state is known.

        Raises ValueError for padding together with packing, packing after a cache, marks of documents that disagree,
        and marks of the wrong shape.
        """
        mask = last_columns(attention_mask, shape)
        marks = {"cu_seq_lens_q": cu_seq_lens, "seq_idx": None if seq_idx is None else _index_bounds(seq_idx, shape)}
        if position_ids is not None and not continued:
            marks["position_ids"] = _position_bounds(position_ids.expand(shape), mask)
        found = {name: bounds for name, bounds in marks.items() if bounds is not None}
        if not found:
            return cls(shape, mask=mask)
        (name, bounds), *others = found.items()
        if mask is not None:
            raise ValueError(f"pads together with packed documents ({name}); accepted: one of the two")
        if continued:
            raise ValueError(
                f"packed documents ({name}) with a filled cache; accepted: packed documents without past_key_values"
            )
        for other, theirs in () if torch.compiler.is_compiling() else others:
            if not torch.equal(torch.unique(bounds.long()), torch.unique(theirs.long())):
                raise ValueError(f"{name} and {other} mark different documents; accepted: one of them, or the same")
        return cls(shape, bounds=bounds)


def _position_bounds(positions: Tensor, mask: Tensor | None) -> Tensor | None:
    """The boundaries of documents whose positions [B, T] restart inside a row; None if none does."""
    inside = positions[:, 1:] <= positions[:, :-1]
    if mask is not None:  # the positions of padding say nothing
        inside &= mask[:, 1:] & mask[:, :-1]
    return document_bounds(positions) if bool(inside.any()) else None


def _index_bounds(seq_idx: Tensor, shape: tuple[int, int]) -> Tensor | None:
    """The boundaries of documents that are numbered [B, T]; None if each row is one document."""
    if seq_idx.shape != shape:
        raise ValueError(f"seq_idx has shape {list(seq_idx.shape)}; accepted for tokens {list(shape)}: {list(shape)}")
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return _bounds(starts) if bool(starts[:, 1:].any()) else None


def last_columns(attention_mask: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """The mask of the last T tokens, [B, T] bool, from one of all tokens; None if all of them are real."""
    if attention_mask is None:
        return None
    B, T = shape
    if attention_mask.dim() != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] < T:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; accepted for tokens {[B, T]}: [{B}, {T} or more]"
        )
    mask = attention_mask[:, attention_mask.shape[1] - T :].bool()
    if torch.compiler.is_compiling() or not bool(mask.all()):
        return mask
    return None


def document_bounds(position_ids: Tensor) -> Tensor:
    """cu_seqlens [N + 1] of rows [B, T] laid end to end, from positions that restart. Every row starts a document.

    Raises ValueError unless all documents begin at the same position.
    """
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
    first = torch.unique(position_ids[starts])
    if len(first) > 1:
        raise ValueError(
            f"position_ids start at {position_ids[:, 0].tolist()} and restart at {first.tolist()}; accepted: all "
            "documents start at the same position"
        )
    return _bounds(starts)


def _bounds(starts: Tensor) -> Tensor:
    """[N + 1] bounds from starts [B, T] bool."""
    bounds = starts.flatten().nonzero().flatten()
    return torch.cat([bounds, bounds.new_tensor([starts.numel()])])


def without_first_labels(labels: Tensor, bounds: Tensor) -> Tensor:
    """Labels [B, T] with those of each document's first token ignored: the token before belongs to another document."""
    first = torch.zeros(labels.numel() + 1, dtype=torch.bool, device=labels.device)
    first[bounds.long()] = True  # the last boundary, and those of empty documents at the end, lie behind the tokens
    return labels.masked_fill(first[:-1].view_as(labels), IGNORED)


def repeat_last_real(hidden: Tensor, mask: Tensor) -> Tensor:
    """Hidden states [B, T, D] in which padding repeats the last real token before it.

    `generate` reads the last column, which may be padding, and so predicts the token after the last real one.
    """
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, columns, 0).cummax(1).values
    return hidden.gather(1, last[..., None].expand_as(hidden))
