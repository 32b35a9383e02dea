import pytest
from hypothesis import given
from hypothesis import strategies as st

from retnet.data import DOCUMENT_START, ByteTokenizer

tokenizer = ByteTokenizer()


@given(st.binary())
def test_any_bytes_survive_a_round_trip(data):
    tokens = tokenizer.encode(data, start=True)
    assert tokens == [DOCUMENT_START, *data]
    assert tokenizer.decode_bytes(tokens) == data
    assert tokenizer.decode(tokens) == data.decode(errors="replace")
    assert tokenizer.encode_batch([data, b"x"]) == [data, b"x"]


@given(st.text())
def test_any_text_survives_a_round_trip(text):
    encodable = text.encode(errors="replace").decode()
    assert tokenizer.decode(tokenizer.encode(encodable)) == encodable


@given(st.binary())
def test_streamed_text_equals_text_decoded_at_once(data):
    decoder = tokenizer.stream_decoder()
    streamed = "".join(decoder.push(token) for token in data) + decoder.flush()
    assert streamed == tokenizer.decode(data)


def test_a_character_appears_only_when_its_last_byte_has_come():
    decoder = tokenizer.stream_decoder()
    assert [decoder.push(byte) for byte in "\u00e9".encode()] == ["", "\u00e9"]


def test_the_document_start_is_added_when_asked_for():
    assert tokenizer.encode("ab") == [97, 98]
    assert tokenizer.encode("ab", start=True) == [256, 97, 98]


def test_bytes_of_a_command_line_that_are_not_utf8_are_kept():
    assert tokenizer.encode(b"\xff".decode(errors="surrogateescape")) == [255]


def test_padding_of_the_vocabulary_decodes_to_nothing_and_negative_tokens_are_refused():
    assert tokenizer.decode([97, 257, 50303, 98]) == "ab"
    with pytest.raises(ValueError, match="a token is -1; accepted: 0 or more"):
        tokenizer.decode([-1])


def test_special_tokens_are_named_by_their_spelling():
    assert ByteTokenizer().special_tokens == {"<|document|>": DOCUMENT_START}
