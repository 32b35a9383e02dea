"""Rows for measurements: spread over an epoch, short ones together."""

from itertools import pairwise

import pytest
import torch

from retnet.data import PackedDataset, open_corpus
from retnet.train.distil.choice import divergence
from retnet.train.distil.samples import SAMPLE_TOKENS, spread
from tests.train.distil.models import teacher


@pytest.mark.parametrize(("length", "rows_per_sample"), [(100, SAMPLE_TOKENS // 100), (2 * SAMPLE_TOKENS, 1)])
@torch.no_grad()
def test_short_rows_share_a_sample_and_give_the_divergence_of_single_ones(length, rows_per_sample, short_texts):
    rows = PackedDataset(open_corpus(short_texts), length, seed=0)
    samples = spread(rows, 2300, torch.device("cpu"))
    count = 2300 // length
    assert samples[0][0].shape[1] // length == min(rows_per_sample, count)
    assert sum(ids.shape[1] for ids, _, _ in samples) == count * length
    alone = [(ids[:, a:b], targets[a:b], torch.tensor([0, b - a]))
             for ids, targets, bounds in samples for a, b in pairwise(bounds.tolist())]  # fmt: skip
    taught, other = teacher(1), teacher(1, gate="sigmoid")
    assert divergence(other, taught, samples) == pytest.approx(divergence(other, taught, alone), rel=1e-5)
