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

    mask: Tensor | None = None
    bounds: Tensor | None = None

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seq_lens: Tensor | None,
        continued: bool,
    ) -> Tokens:
        """From transformers' inputs for tokens [B, T]; `continued`: they follow tokens whose state is known.

        Raises ValueError for padding together with packing, packing after a cache, and a mask of the wrong shape.
        """
        mask = last_columns(attention_mask, shape)
        bounds = cu_seq_lens
        if bounds is None and position_ids is not None and not continued:
            positions = position_ids.expand(shape)
            inside = positions[:, 1:] == 0
            if mask is not None:  # the positions of padding say nothing
                inside &= mask[:, 1:] & (mask.cumsum(1)[:, 1:] > 1)
            if bool(inside.any()):
                bounds = document_bounds(positions)
        if bounds is None:
            return cls(mask=mask)
        if mask is not None:
            raise ValueError("pads together with packed documents (position_ids that restart) are not supported")
        if continued:
            raise ValueError("packed documents (cu_seq_lens_q) with a filled cache are not supported")
        return cls(bounds=bounds)


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
    """cu_seqlens [N + 1] of rows [B, T] laid end to end, from positions that restart at 0. Every row starts a document.

    Raises ValueError if a row does not begin at 0.
    """
    starts = position_ids.flatten() == 0
    if not bool((position_ids[:, 0] == 0).all()):
        raise ValueError(f"position_ids start at {position_ids[:, 0].tolist()}; packed rows start at 0")
    bounds = starts.nonzero().flatten()
    return torch.cat([bounds, bounds.new_tensor([position_ids.numel()])])


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
