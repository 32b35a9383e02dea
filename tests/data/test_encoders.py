import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from retnet.data import encoders
from retnet.data.encoders import ByteEncoder, find_encoder, saved_encoder


@pytest.fixture(scope="session")
def encoder(tokenizer_file):
    return find_encoder(str(tokenizer_file))


@settings(max_examples=40)
@given(st.lists(st.text(), max_size=4))
def test_any_text_survives_a_round_trip_at_its_full_length(encoder, texts):
    texts = [text.encode(errors="replace") for text in texts]
    for text, tokens in zip(texts, encoder.encode(texts), strict=True):
        assert encoder.decode(tokens).encode() == text
        assert tokens.dtype == encoder.dtype == np.uint16


@given(st.binary())
def test_any_bytes_are_tokens_of_their_own(data):
    (tokens,) = ByteEncoder().encode([data])
    assert tokens.tolist() == list(data)
    assert ByteEncoder().decode([256, *tokens]) == data.decode(errors="replace")


def test_special_tokens_spelled_in_a_text_are_text(encoder):
    (tokens,) = encoder.encode([b"a <|endoftext|> b"])
    assert encoder.document_start not in tokens
    assert encoder.decode(tokens) == "a <|endoftext|> b"


def test_starts_and_ends_are_dropped_when_decoding(tokenizer_file):
    encoder = find_encoder(str(tokenizer_file), with_end=True)
    (tokens,) = encoder.encode([b"naive"])
    assert encoder.document_end == encoder.document_start == 0
    assert encoder.decode([0, *tokens, 0]) == "naive"


def test_the_document_start_comes_from_the_tokenizers_config(tokenizer_file, tmp_path):
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    number = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"special tokens: <\|endoftext\|>, <s> \(choose one with --document-start\)"):
        find_encoder(str(tmp_path))
    assert find_encoder(str(tmp_path), "<s>").document_start == number
    config = {"bos_token": {"content": "<s>"}, "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    encoder = find_encoder(str(tmp_path), with_end=True)
    assert (encoder.document_start, encoder.document_end, encoder.vocab_size) == (number, 0, number + 1)


def test_transformers_loads_what_is_saved_beside_the_tokens(encoder, tmp_path, articles):
    from transformers import AutoTokenizer

    encoder.save(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded.bos_token_id == loaded.eos_token_id == encoder.document_start
    (tokens,) = encoder.encode([articles[0].encode()])
    assert loaded(articles[0], add_special_tokens=False, truncation=False).input_ids == tokens.tolist()


def test_a_saved_encoder_is_the_same_and_another_file_in_its_place_is_refused(encoder, tmp_path, tokenizer_file):
    encoder.save(tmp_path / "saved")
    again = saved_encoder(tmp_path / "saved", encoder.describe())
    assert again.encode([b"state decay"])[0].tolist() == encoder.encode([b"state decay"])[0].tolist()
    assert again.describe() == encoder.describe()
    shutil.copyfile(tokenizer_file, tmp_path / "saved/tokenizer.json")
    with open(tmp_path / "saved/tokenizer.json", "a") as file:
        file.write(" ")
    with pytest.raises(ValueError, match="not the tokenizer of these tokens"):
        saved_encoder(tmp_path / "saved", encoder.describe())


def test_tokenizers_that_cannot_be_used_are_refused(tmp_path, tokenizer_file):
    with pytest.raises(FileNotFoundError, match=r"no such tokenizer: .*gone\.json .*accepted: bytes"):
        find_encoder(str(tmp_path / "gone.json"))
    with pytest.raises(FileNotFoundError, match=r"no such tokenizer: .*tokenizer\.json"):
        find_encoder(str(tmp_path))
    with pytest.raises(ValueError, match=r"no special token '<s>'; it has: <\|endoftext\|>"):
        find_encoder(str(tokenizer_file), "<s>")
    with pytest.raises(ValueError, match="bytes have one document start"):
        find_encoder("bytes", with_end=True)
    for text in ("{}", "not json"):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
            find_encoder(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[]", "is a JSON list; accepted: an object"),
        ('{"bos_token": {"x": 1}}', r"""bos_token is \{"x": 1\}; accepted: text, null, or an object with 'content'"""),
        ('{"eos_token": ["<s>"]}', r'eos_token is \["<s>"\]; accepted'),
        ('{"bos_token": {"content": 3}}', "bos_token is .*; accepted"),
        ("{cut", "is not JSON"),
        ("\xff", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_config_that_cannot_be_used_is_named(tmp_path, tokenizer_file, config, message):
    shutil.copyfile(tokenizer_file, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(config, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json.*{message}"):
        find_encoder(str(tmp_path))


def test_a_saved_tokenizer_is_on_the_disk(encoder, tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(encoders, "flush", flushed.append)
    encoder.save(tmp_path / "saved")
    assert sorted(flushed[:-1]) == sorted((tmp_path / "saved").iterdir())
    assert flushed[-1] == tmp_path / "saved"


def test_a_tokenizer_of_the_hub_is_fetched_and_one_that_is_not_there_is_named(tokenizer_file, monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def fetch(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "org/gone":
            raise OSError("404")
        return str(tokenizer_file.parent if name == "org/model" else tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert find_encoder("org/model").identity == find_encoder(str(tokenizer_file)).identity
    assert asked == [("org/model", ["tokenizer.json", "tokenizer_config.json"])]
    with pytest.raises(FileNotFoundError, match=r"no such tokenizer: org/gone .*: 404"):
        find_encoder("org/gone")
    with pytest.raises(FileNotFoundError, match=r"org/without on the hub has no tokenizer\.json"):
        find_encoder("org/without")
