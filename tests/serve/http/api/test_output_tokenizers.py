"""Text deltas of every kind of tokenizer: texts that go on from a prompt, and stop strings across tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet.data.tokenizer import ByteTokenizer
from retnet.serve.http.api.fields import Stops
from retnet.serve.http.api.logprobs import TokenNames, completion_logprobs
from retnet.serve.http.api.output import OutputToken
from retnet.serve.request import TokenLogprobs
from retnet.serve.stopping import StopStrings
from tests.serve.http.api.test_output import deltas, pieces_of
from tests.serve.http.chat.models import MAKERS, save_tokenizer

TEXT = "the river how are you? naïve 状态 😀 the end\n\n how now"
KINDS = ["bytes", *MAKERS]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {name: save_tokenizer(folder / name, name, None) for name in MAKERS}
    return made | {"bytes": ByteTokenizer()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_goes_on_from_its_prompt(tokenizers, kind):
    """Spaces at the place where the prompt ends included: Llama's decoder drops them at the start of a text."""
    tokenizer = tokenizers[kind]
    tokens = tokenizer.encode(TEXT, start=True)
    whole = tokenizer.decode(tokens)
    for split in range(1, len(tokens)):
        before = tokenizer.decode(tokens[:split])
        if before.endswith("\ufffd"):
            continue
        given = deltas(pieces_of(tokens[split:], "length"), tokenizer, after=tokens[:split])
        assert before + "".join(delta.text for delta in given) == whole


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(data=st.data())
def test_stop_strings_of_any_characters_end_the_text_wherever_tokens_end(tokenizers, kind, data):
    tokenizer = tokenizers[kind]
    tokens = tokenizer.encode(TEXT)
    whole = tokenizer.decode(tokens)
    begin = data.draw(st.integers(0, len(whole) - 1))
    stop = whole[begin : begin + data.draw(st.integers(1, 8))]
    stops = Stops((stop, "never", stop + "no"))
    engines = StopStrings(stops.strings, tokenizer.decode)  # as the engine finds the end
    count = next(i for i, token in enumerate(tokens, 1) if engines.push(token) is not None)
    given = deltas(pieces_of(tokens[:count], "stop_string"), tokenizer, stops, logprobs=True)
    assert "".join(delta.text for delta in given) == whole[: whole.index(stop)]
    assert (given[-1].finish_reason, given[-1].stop_reason) == ("stop", stop)
    assert sum(len(delta.tokens) for delta in given) == count


@pytest.mark.parametrize("kind", KINDS)
def test_strings_of_tokens_join_to_the_text(tokenizers, kind):
    tokenizer = tokenizers[kind]
    names = TokenNames(tokenizer)
    plain = "the river how are you, how now"
    tokens = tokenizer.encode(plain)
    assert "".join(names.text(token) for token in tokens).strip() == tokenizer.decode(tokens).strip()
    assert b"".join(names.bytes(token) for token in tokenizer.encode(TEXT)).decode().strip() == tokenizer.decode(
        tokenizer.encode(TEXT)
    )
    assert names.text(tokenizer.document_start) in ("<s>", "<|document|>")


def test_two_tokens_of_one_string_are_both_among_the_likeliest(tokenizers):
    tokenizer = tokenizers["metaspace"]
    [letter] = tokenizer.encode("xa")[-1:]
    byte = next(
        token for token in range(tokenizer.vocab_size) if token != letter and tokenizer.token_bytes(token) == b"a"
    )
    entry = OutputToken(byte, TokenLogprobs(-3.0, {letter: -1.0}), 0, 1)
    body = completion_logprobs([entry], TokenNames(tokenizer))
    assert body["top_logprobs"] == [{"a": -1.0, f"token_id:{byte}": -3.0}]
