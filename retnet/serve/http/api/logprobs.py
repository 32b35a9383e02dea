"""Log-probabilities in OpenAI's two forms, and tokens as strings and bytes.

JSON has no infinity. A token that the model rules out has the log-probability -9999.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from retnet.data.tokenizer import Tokenizer
from retnet.serve.http.api.output import OutputToken
from retnet.serve.request import TokenLogprobs

FLOOR = -9999.0


class TokenNames:
    """Tokens of a tokenizer as strings and bytes.

    A token's string is its text inside a text. One that is no whole characters is `bytes:` and its bytes as `\\xNN`, a
    special token is its spelling, and one without any is `token_id:` and its number.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._special = {token: spelling for spelling, token in tokenizer.special_tokens.items()}
        self._names: dict[int, tuple[str, bytes]] = {}

    def text(self, token: int) -> str:
        return self._find(token)[0]

    def bytes(self, token: int) -> bytes:
        return self._find(token)[1]

    def _find(self, token: int) -> tuple[str, bytes]:
        found = self._names.get(token)
        if found is None:
            found = self._names[token] = self._name(token)
        return found

    def _name(self, token: int) -> tuple[str, bytes]:
        data = self._tokenizer.token_bytes(token)
        if not data:
            name = self._special.get(token, f"token_id:{token}")
            return name, name.encode()
        try:
            data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data
        alone = self._tokenizer.decode([token])  # may lack a space that stands before a token inside a text
        inside = self._tokenizer.decode([token, token])[len(alone) :]
        return inside, inside.encode()


def completion_logprobs(tokens: Iterable[OutputToken], names: TokenNames, first_offset: int = 0) -> dict[str, Any]:
    """The form of /v1/completions: four lists with one entry per token. first_offset: characters before the output.

    A token that ended the text, or is part of a stop string, is there with the string "".
    """
    body: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        name = names.text(token.token) if token.text is None else token.text
        _add(body, names, token.token, name, token.logprobs, first_offset + token.begin)
    return body


def prompt_logprobs(
    tokens: Sequence[int], logprobs: Sequence[TokenLogprobs | None], tokenizer: Tokenizer, names: TokenNames
) -> dict[str, Any]:
    """The same for the tokens of a prompt; the first of a context has the log-probability null."""
    body: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    decoder, offset = tokenizer.stream_decoder(), 0
    for token, entry in zip(tokens, logprobs, strict=True):
        _add(body, names, token, names.text(token), entry, offset)
        offset += len(decoder.push(token))
    return body


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities of a prompt and its completion as one."""
    return {name: first[name] + second[name] for name in first}


def chat_logprobs(tokens: Iterable[OutputToken], names: TokenNames) -> dict[str, Any]:
    """The form of /v1/chat/completions. Tokens that are no part of the text are left out."""
    content = []
    for token in tokens:
        if token.text == "":
            continue
        entry = _chat_entry(token.token, token.logprobs.logprob, names)
        if token.text is not None:
            entry |= {"token": token.text, "bytes": list(token.text.encode())}
        top = _with_chosen(token.token, token.logprobs) if token.logprobs.top else {}
        content.append(entry | {"top_logprobs": [_chat_entry(t, value, names) for t, value in top.items()]})
    return {"content": content, "refusal": None}


def _chat_entry(token: int, logprob: float, names: TokenNames) -> dict[str, Any]:
    return {"token": names.text(token), "logprob": max(logprob, FLOOR), "bytes": list(names.bytes(token))}


def _add(
    body: dict[str, list[Any]], names: TokenNames, token: int, name: str, logprobs: TokenLogprobs | None, offset: int
) -> None:
    body["tokens"].append(name)
    body["text_offset"].append(offset)
    if logprobs is None:
        body["token_logprobs"].append(None)
        body["top_logprobs"].append(None)
        return
    body["token_logprobs"].append(max(logprobs.logprob, FLOOR))
    top: dict[str, float] = {}
    for other, value in _with_chosen(token, logprobs).items():
        string = names.text(other)
        top[f"token_id:{other}" if string in top else string] = max(value, FLOOR)
    body["top_logprobs"].append(top)


def _with_chosen(token: int, logprobs: TokenLogprobs) -> dict[int, float]:
    """The likeliest tokens and, after them, the chosen one, unless it is among them."""
    return logprobs.top if token in logprobs.top else {**logprobs.top, token: logprobs.logprob}
