"""Encoder of texts with special tokens in them, which keeps special tokens that the text itself spells as text.

A tokenizer either finds every special token that is spelled in a text, or none. Each special token therefore gets an
alias: another added token with the same rules for spaces around it, and a spelling that nobody can guess. A text is
encoded with special tokens off, and its aliases become the special tokens. So the whole text goes through the tokenizer
once, and what is at the start of a text, or next to a special token, is treated as in transformers.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from retnet.system.extras import needs

if TYPE_CHECKING:
    import tokenizers

EDGE = "\uf8ff"  # of an alias: a private character, so no word and no space


class PartsEncoder:
    """Encodes parts of text with token ids between them.

    tokenizer: a copy that this encoder may change. special: spelling and id of the tokens that may stand between parts.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, special: Mapping[str, int]):
        with needs("hf", "A tokenizer.json"):
            from tokenizers import AddedToken

        tokenizer.no_truncation()
        tokenizer.post_processor = None  # it only trims the spaces off the places of tokens here
        tokenizer.no_padding()
        flags = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
        tokenizer.add_special_tokens([flags.get(content, AddedToken(content, special=True)) for content in special])
        tokenizer.encode_special_tokens = True
        secret = secrets.token_hex(8)
        self._aliases = {token: f"{EDGE}{secret}.{token}{EDGE}" for token in special.values()}
        for content, token in special.items():
            known = flags.get(content)
            lstrip, rstrip = (False, False) if known is None else (known.lstrip, known.rstrip)
            tokenizer.add_tokens([AddedToken(self._aliases[token], lstrip=lstrip, rstrip=rstrip, normalized=False)])
        self._special = {tokenizer.token_to_id(alias): token for token, alias in self._aliases.items()}
        self._tokenizer = tokenizer

    def places(self, parts: Sequence[str | int]) -> list[tuple[int, int, int, bool]]:
        """(token, begin, end, whether it stood between the parts): places as `Tokenizer.places_of_parts` counts."""
        spelt = [self._aliases[part] if isinstance(part, int) else part for part in parts]
        encoding = self._tokenizer.encode_batch(["".join(spelt)], add_special_tokens=False)[0]
        # Places in the text with aliases, and the places that they count as: an alias is one unit.
        edges = np.array([0, *accumulate(map(len, spelt))])
        units = np.array([0, *accumulate(1 if isinstance(part, int) else len(part) for part in parts)])
        begins, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        part = np.minimum(np.searchsorted(edges, begins, side="right") - 1, len(parts) - 1)
        first = units[part] + np.minimum(begins - edges[part], np.diff(units)[part] - 1)
        part = np.maximum(np.searchsorted(edges, ends) - 1, 0)
        last = units[part] + np.minimum(ends - edges[part], np.diff(units)[part])
        return [
            (self._special.get(token, token), begin, end, token in self._special)
            for token, begin, end in zip(encoding.ids, first.tolist(), last.tolist(), strict=True)
        ]

    def encode(self, parts: Sequence[str | int]) -> list[list[int] | int]:
        """Special tokens, as given, and between them the tokens of the text."""
        text = "".join(self._aliases[part] if isinstance(part, int) else part for part in parts)
        runs: list[list[int] | int] = []
        run: list[int] = []
        for token in self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids:
            special = self._special.get(token)
            if special is None:
                run.append(token)
                continue
            if run:
                runs.append(run)
                run = []
            runs.append(special)
        return [*runs, run] if run else runs
