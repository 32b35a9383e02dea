import pytest
from hypothesis import given
from hypothesis import strategies as st

from retnet.data import DOCUMENT_START, ByteTokenizer

tokenizer = ByteTokenizer()


@given(st.binary())
def test_any_bytes_survive_a_round_trip(data):
    tokens = tokenizer.encode(data)
    assert tokens[0] == DOCUMENT_START
    assert len(tokens) == len(data) + 1
    assert tokenizer.decode_bytes(tokens) == data


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
    assert [decoder.push(byte) for byte in "é".encode()] == ["", "é"]


def test_the_document_start_can_be_left_out():
    assert tokenizer.encode("ab", document_start=False).tolist() == [97, 98]


@pytest.mark.parametrize("token", [-1, 257])
def test_tokens_outside_the_vocabulary_are_refused(token):
    with pytest.raises(ValueError, match=f"0 to 256, got {token}"):
        tokenizer.decode([token])
