"""The text of every token, for grammars: a token is allowed where its bytes fit."""

from __future__ import annotations

from retnet.data.stream_decoder import REPLACEMENT
from retnet.data.tokenizer import ByteTokenizer, Tokenizer

_NEVER_IN_TEXT = 0xFF  # a byte of no UTF-8 text; llguidance marks special tokens with it


def text_of_tokens(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
    """The bytes of each token inside a text [vocab_size]; b"" for special tokens and padding, which have no text."""
    special = set(tokenizer.special_tokens.values())
    known = range(min(vocab_size, tokenizer.vocab_size))
    if isinstance(tokenizer, ByteTokenizer):
        texts = [tokenizer.token_bytes(token) for token in known]
    else:
        texts = _decoded(tokenizer, known)
    for token in known:
        if token in special or _NEVER_IN_TEXT in texts[token]:
            texts[token] = b""
    return texts + [b""] * (vocab_size - len(known))


def _decoded(tokenizer: Tokenizer, tokens: range) -> list[bytes]:
    """What each token adds to a text: some decoders write a space for a character of the token, or none at the start
    of a text. A token with parts of a character has its own bytes."""
    anchor = next((ids[-1] for text in ("a", "0", ".") if (ids := tokenizer.encode(text))), 0)
    before = tokenizer.decode([anchor])
    texts: list[bytes] = []
    for token in tokens:
        after = tokenizer.decode([anchor, token])
        own = tokenizer.token_bytes(token)
        whole = bool(own) and after.startswith(before) and REPLACEMENT not in after
        texts.append(after[len(before) :].encode() if whole else own)
    return texts
