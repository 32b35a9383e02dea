"""A corpus in memory whose tokens tell document and position apart."""

from __future__ import annotations

import numpy as np
import pytest

from retnet.data import Corpus


class NumberedCorpus(Corpus):
    """Document d is the document start, 0, and then `size` tokens that count up from 1000 d + 1."""

    document_start = 0
    vocab_size = 1_000_000

    def __init__(self, sizes, name="numbered", vocab_size=1_000_000):
        self.name = name
        self.vocab_size = vocab_size
        self.lengths = np.array(sizes, dtype=np.int64) + 1
        self.num_bytes = 3 * sum(sizes)

    def whole(self, document):
        return np.concatenate([[0], np.arange(1, self.lengths[document]) + 1000 * document])

    def tokens(self, document, start=0, stop=None):
        return self.whole(document)[start:stop]

    def text_tokens(self):
        return [int(token) for document in range(len(self)) for token in self.whole(document)[1:]]

    def describe(self, document):
        return f"document {document}"

    def decode(self, tokens):
        return " ".join(str(token) for token in tokens)

    def split(self, valid_fraction):
        raise NotImplementedError

    @property
    def fingerprint(self):
        return str(self.lengths.tolist())


@pytest.fixture(scope="session")
def numbered():
    return NumberedCorpus
