"""Helpers for the tests of data: a corpus in memory whose tokens tell documents apart, texts, and a small tokenizer."""

from __future__ import annotations

import random

import numpy as np
import pytest

from retnet.data import Corpus
from retnet.data.build import build_shards
from retnet.data.plan import Settings
from tests.data.folders import SEPARATOR, write_texts


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

    @property
    def tokenizer(self):
        raise NotImplementedError

    def split(self, valid_fraction):
        raise NotImplementedError

    @property
    def fingerprint(self):
        return str(self.lengths.tolist())


@pytest.fixture(scope="session")
def numbered():
    return NumberedCorpus


@pytest.fixture(scope="session")
def articles():
    """60 texts of a few hundred characters, some of them not ASCII."""
    rng = random.Random(0)
    words = ["state", "decay", "chunk", "naïve", "φύσις", "状态", "😀", "It's", "1234", "(x+y)", "token"]
    lines = [[" ".join(rng.choices(words, k=rng.randint(3, 12))) for _ in range(rng.randint(1, 12))] for _ in range(60)]
    return ["\n".join(text) for text in lines]


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory, articles):
    """A byte-level BPE tokenizer like GPT-2's, of 400 tokens. Like many on the hub, it truncates and pads texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(articles, trainer)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def source(tmp_path, articles):
    """A text file of 60 documents, and 60 more as jsonl."""
    write_texts(tmp_path / "source", articles)
    return tmp_path / "source"


@pytest.fixture
def build(source, tokenizer_file):
    def run(out, shard_size=4000, workers=1, sources=(str(source),), **options):
        has_text = not all(path.endswith(".jsonl") for path in sources)
        how = Settings(separator=SEPARATOR if has_text else None)
        options = {"tokenizer": str(tokenizer_file), "settings": how} | options
        return build_shards(sources, out, shard_size=shard_size, workers=workers, **options)

    return run
