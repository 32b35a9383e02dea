import json
import pickle

import numpy as np
import pytest
import torch

from retnet.data import ByteCorpus, PackedDataset, find_documents, open_corpus
from retnet.data.build import build_shards


@pytest.fixture
def texts(tmp_path, articles):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(articles):
        (folder / f"{number:02}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def shards(tmp_path, texts, tokenizer_file):
    build_shards([str(texts)], tmp_path / "shards", tokenizer=str(tokenizer_file), shard_size=3000, workers=1)
    return tmp_path / "shards"


@pytest.fixture
def book(tmp_path, articles, tokenizer_file):
    """Shards of one long document."""
    (tmp_path / "book.txt").write_text("\n".join(articles), encoding="utf-8")
    build_shards([str(tmp_path / "book.txt")], tmp_path / "book", tokenizer=str(tokenizer_file), workers=1)
    return tmp_path / "book"


def text_of(corpus, document):
    return corpus.decode(corpus.tokens(document).tolist())


def test_shards_of_bytes_give_the_rows_that_the_files_give(tmp_path, texts):
    build_shards([str(texts)], tmp_path / "out", shard_size=3000, workers=1)
    files, shards = open_corpus(texts), open_corpus(tmp_path / "out")
    assert isinstance(files, ByteCorpus)
    assert not isinstance(shards, ByteCorpus)
    assert (files.tokenizer_id, files.vocab_size, files.num_bytes) == (
        shards.tokenizer_id,
        shards.vocab_size,
        shards.num_bytes,
    )
    first, second = (PackedDataset(corpus, 64, seed=3) for corpus in (files, shards))
    assert len(first) == len(second)
    for i in range(len(first)):
        for key, value in first[i].items():
            assert torch.equal(value, second[i][key])


def test_parts_of_a_document_are_slices_of_it(shards, texts):
    for corpus in (open_corpus(shards), open_corpus(texts), open_corpus(shards).split(0.3)[1]):
        whole = corpus.tokens(2).tolist()
        assert len(whole) == corpus.lengths[2]
        assert whole[0] == corpus.document_start
        for start, stop in [(0, 1), (0, 7), (1, 7), (3, None), (5, 5)]:
            assert corpus.tokens(2, start, stop).tolist() == whole[start:stop]


def test_a_split_of_shards_depends_on_the_text_alone_and_loses_nothing(shards, tmp_path, tokenizer_file, articles):
    corpus = open_corpus(shards)
    train, valid = corpus.split(0.3)
    sides = [{text_of(side, d) for d in range(len(side))} for side in (train, valid)]
    assert sides[0] | sides[1] == set(articles)
    assert not sides[0] & sides[1]
    assert 5 <= len(valid) <= 30
    assert train.num_bytes + valid.num_bytes == corpus.num_bytes
    assert valid.num_bytes == sum(len(text_of(valid, d).encode()) for d in range(len(valid)))
    assert valid.num_tokens == sum(len(valid.tokens(d)) for d in range(len(valid)))
    # Twice as many documents in another order, half of them copies, in another kind of file.
    lines = [json.dumps({"text": text}) for text in [*articles[::-1], "new", *articles]]
    (tmp_path / "more.jsonl").write_text("\n".join(lines))
    build_shards([str(tmp_path / "more.jsonl")], tmp_path / "more", tokenizer=str(tokenizer_file), workers=1)
    more = open_corpus(tmp_path / "more").split(0.3)
    again = [{text_of(side, d) for d in range(len(side))} - {"new"} for side in more]
    assert again == sides


def test_one_document_is_split_at_its_end_between_characters(book, articles):
    whole = open_corpus(book)
    for fraction in np.linspace(0.01, 0.9, 40):
        train, valid = whole.split(fraction)
        head, tail = text_of(train, 0), text_of(valid, 0)
        assert head + tail == "\n".join(articles)
        assert (train.num_bytes, valid.num_bytes) == (len(head.encode()), len(tail.encode()))
        assert valid.tokens(0)[0] == whole.document_start
        assert abs(int(valid.lengths[0]) - fraction * int(whole.lengths[0])) < 6
    assert valid.describe(0).startswith("book.txt from token ")


def test_the_cut_off_end_of_a_document_is_decoded_once(book, monkeypatch):
    whole = open_corpus(book)
    decoded = []
    decode = whole.decode
    monkeypatch.setattr(whole, "decode", lambda tokens: decoded.append(len(tokens)) or decode(tokens))
    for fraction in np.linspace(0.5, 0.9, 20):
        decoded.clear()
        _, valid = whole.split(fraction)
        assert sum(size > 4 for size in decoded) == 1
        assert max(decoded) == valid.lengths[0] - 1


def test_a_cut_falls_between_characters_of_tokens_that_are_single_bytes(tmp_path):
    """Llama's kind of vocabulary: characters outside it become byte tokens, and a run of these is decoded together."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "</s>": 1, "x": 2, **{f"<0x{byte:02X}>": byte + 3 for byte in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "状态x😀é" * 50
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    build_shards([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer=str(tmp_path / "tokenizer.json"), workers=1)
    whole = open_corpus(tmp_path / "out")
    for fraction in np.linspace(0.1, 0.9, 40):
        train, valid = whole.split(fraction)
        assert text_of(train, 0) + text_of(valid, 0) == text
        assert valid.num_bytes == len(text_of(valid, 0).encode())


def test_too_little_text_to_split_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    build_shards([str(tmp_path / "a.txt")], tmp_path / "out")
    with pytest.raises(ValueError, match=r"too little text in .*out .*: 1 bytes in all"):
        open_corpus(tmp_path / "out").split(0.1)
    with pytest.raises(ValueError, match="valid_fraction is 1; accepted: between 0 and 1"):
        open_corpus(tmp_path / "out").split(1)


def test_a_corpus_of_shards_is_pickled_without_its_tokens(shards):
    corpus = open_corpus(shards)
    expected = corpus.tokens(3).tolist()
    data = pickle.dumps(corpus)
    assert len(data) < 20_000
    assert pickle.loads(data).tokens(3).tolist() == expected


def test_fingerprints_differ_by_contents_split_and_tokenizer(texts, shards, tmp_path, tokenizer_file):
    prints = {open_corpus(path).fingerprint for path in (texts, shards)}
    assert open_corpus(shards).fingerprint in prints
    prints |= {side.fingerprint for side in open_corpus(shards).split(0.3)}
    prints |= {side.fingerprint for side in open_corpus(texts).split(0.3)}
    first = next(texts.iterdir())
    data = first.read_bytes()
    first.write_bytes(data[:-1] + b"!")
    prints.add(open_corpus(texts).fingerprint)
    build_shards([str(texts)], tmp_path / "a", tokenizer=str(tokenizer_file), shard_size=3000, workers=1)
    prints.add(open_corpus(tmp_path / "a").fingerprint)
    build_shards([str(texts)], tmp_path / "b", tokenizer=str(tokenizer_file), with_end=True, workers=1)
    prints.add(open_corpus(tmp_path / "b").fingerprint)
    assert len(prints) == 9
    first.write_bytes(data)
    build_shards([str(texts)], tmp_path / "c", tokenizer=str(tokenizer_file), shard_size=3000, workers=1)
    assert open_corpus(tmp_path / "c").fingerprint == open_corpus(shards).fingerprint


def test_transformers_loads_the_tokenizer_of_a_corpus(shards, texts):
    assert open_corpus(texts).tokenizer_directory is None
    assert (open_corpus(shards).tokenizer_directory / "tokenizer_config.json").is_file()


def test_documents_of_files_name_their_path(texts):
    corpus = open_corpus(texts)
    assert corpus.describe(1) == str(texts / "01.txt")
    (single,) = find_documents(texts / "01.txt")
    assert ByteCorpus([single]).split(0.2)[1].describe(0).startswith(f"{texts / '01.txt'} from byte ")
