"""Batches whose rows are in another order than a state needs, as a test of shards must notice."""

from __future__ import annotations

from typing import Any

from tests.ops.context_checks import head_to_tail

TOKENS = ("input_ids", "labels", "shift_labels")  # the tensors of a batch that shards cut


def head_to_tail_batch(batch: dict[str, Any], size: int) -> dict[str, Any]:
    """The rows of a batch, end to end, in the order of load-balanced causal attention."""
    return {**batch, **{name: head_to_tail(batch[name].reshape(1, -1), size) for name in TOKENS}}
