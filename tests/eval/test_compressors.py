import gzip
import lzma
import math
import random
from collections import Counter

import pytest

from retnet.data import find_documents
from retnet.eval.compressors import Order2Model, compressor_table, gzip_bits_per_byte, xz_bits_per_byte


@pytest.fixture
def texts(tmp_path):
    rng = random.Random(0)
    words = [bytes(rng.choices(b"abcdefgh", k=rng.randint(2, 7))) for _ in range(50)]
    for i in range(4):
        (tmp_path / f"{i}.txt").write_bytes(b" ".join(rng.choices(words, k=300)))
    return find_documents(tmp_path)


def test_gzip_and_xz_report_the_size_of_the_real_streams(texts):
    data = b"".join(d.read() for d in texts)
    assert gzip_bits_per_byte(texts) == 8 * len(gzip.compress(data, 9, mtime=0)) / len(data)
    assert xz_bits_per_byte(texts) == 8 * len(lzma.compress(data, preset=9)) / len(data)


def plain_order2_bits(train, text):
    """The definition, one byte at a time."""
    counts = [Counter(), Counter(), Counter()]
    followers = [{}, {}, {}]
    for data in train:
        padded = bytes(2) + data
        for i in range(2, len(padded)):
            for order in range(3):
                context, x = padded[i - order : i], padded[i]
                counts[order][context] += 1
                followers[order].setdefault(context, Counter())[x] += 1
    bits = 0.0
    padded = bytes(2) + text
    for i in range(2, len(padded)):
        p = 1 / 256
        for order in range(3):
            context, x = padded[i - order : i], padded[i]
            seen = followers[order].get(context, Counter())
            distinct = max(len(seen), 1)
            p = (seen[x] + distinct * p) / (counts[order][context] + distinct)
        bits -= math.log2(p)
    return bits / len(text)


def test_the_order_2_model_is_its_definition(texts):
    train, valid = texts[:3], texts[3:]
    expected = plain_order2_bits([d.read() for d in train], valid[0].read())
    assert Order2Model(train).bits_per_byte(valid) == pytest.approx(expected, rel=1e-9)


def test_the_order_2_model_gives_unseen_bytes_a_probability(texts, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(bytes(range(1, 256)) * 3)
    bits = Order2Model(texts).bits_per_byte(find_documents(other))
    assert 8 < bits < 64


def test_the_table_names_every_method_and_the_order_2_model_only_if_trained(texts):
    table = compressor_table(texts[:3], texts[3:])
    assert set(table) == {"gzip -9", "xz -9", "order-2 bytes"}
    assert all(0 < bits < 8 for bits in table.values())
    assert set(compressor_table(None, texts)) == {"gzip -9", "xz -9"}
