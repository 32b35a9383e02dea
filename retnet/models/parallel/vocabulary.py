"""Embedding and head split by vocabulary: each process has the rows of its tokens.

Looking up is exact: each token's row is one process's, and the others add zeros. Logits are joined: every process has
those of the whole vocabulary. The loss is computed without joining them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from retnet.layers.tensor_parallel import become_
from retnet.models.loss import slice_rows
from retnet.ops.dtypes import wide_dtype
from retnet.ops.tensor_shard import TensorShard


class VocabularyEmbedding(nn.Embedding):
    """ids [...] -> embeddings [..., D], equal on all processes."""

    shard: TensorShard

    def forward(self, input: Tensor) -> Tensor:
        span = self.shard.span(self.num_embeddings)
        elsewhere = (input < span.start) | (input >= span.stop)
        # Ids outside the vocabulary raise on every process, as an embedding does; those of other processes are row 0.
        places = torch.where(
            elsewhere, input.masked_fill((input >= 0) & (input < self.num_embeddings), 0), input - span.start
        )
        return self.shard.total(F.embedding(places, self.weight).masked_fill(elsewhere[..., None], 0))


class VocabularyHead(nn.Linear):
    """hidden [..., D] -> logits [..., vocab], equal on all processes. out_features: the whole vocabulary."""

    shard: TensorShard

    def forward(self, input: Tensor) -> Tensor:
        return self.shard.gathered(F.linear(self.shard.share(input), self.weight), self.out_features)

    def mean_nats(self, hidden: Tensor, labels: Tensor, soft_cap: float | None) -> Tensor:
        """`retnet.models.loss.linear_cross_entropy` with this head: each process holds a slice of its own logits.

        The logits of a slice are computed again in the backward pass.
        """
        hidden, labels = self.shard.share(hidden).flatten(0, -2), labels.flatten()
        rows = slice_rows(hidden, len(self.weight))
        total = hidden.new_zeros((), dtype=wide_dtype(hidden.dtype))
        for h, target in zip(hidden.split(rows), labels.split(rows), strict=True):
            total = total + checkpoint(self._nats, h, target, soft_cap, use_reentrant=False)
        return total / (labels != -100).sum().clamp_min(1)

    def _nats(self, hidden: Tensor, labels: Tensor, soft_cap: float | None) -> Tensor:
        """The sum of -log softmax at labels [R] of hidden [R, D]."""
        shard, ignored = self.shard, labels == -100
        logits = F.linear(hidden.masked_fill(ignored[:, None], 0), self.weight)
        logits = logits.to(wide_dtype(logits.dtype))
        if soft_cap is not None:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        span = shard.span(self.out_features)
        if span.start < span.stop:
            largest = logits.detach().amax(-1)
        else:  # more processes than tokens
            largest = logits.new_full(logits.shape[:1], -torch.inf)
        largest = shard.largest_(largest)
        normalizer = largest + shard.total((logits - largest[:, None]).exp().sum(-1)).log()
        elsewhere = (labels < span.start) | (labels >= span.stop)
        padded = F.pad(logits, (0, 1))  # a place for the labels of other processes
        places = (labels - span.start).masked_fill(elsewhere, logits.shape[-1])
        at_label = shard.total(padded.gather(1, places[:, None])[:, 0].masked_fill(elsewhere, 0))
        return (normalizer - at_label).masked_fill(ignored, 0).sum()


def split_vocabulary_(embedding: nn.Embedding, head: nn.Linear | None, shard: TensorShard) -> None:
    """Keep this process's rows of both, which may be one tied parameter. head None: of a model without one."""
    keep_rows_(embedding.weight, embedding.num_embeddings, shard)
    become_(embedding, VocabularyEmbedding, shard)
    if head is not None:
        keep_rows_(head.weight, head.out_features, shard)
        become_(head, VocabularyHead, shard)


def keep_rows_(weight: Tensor, count: int, shard: TensorShard) -> None:
    """Replace a parameter of `count` rows by this process's rows; one that has them already stays."""
    if len(weight) == count:
        weight.grad = None
        weight.data = weight.data[shard.span(count)].clone()
