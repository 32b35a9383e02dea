"""Fields of OpenAI's, vLLM's and others' APIs that the server does not honour, and what to use instead."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from retnet.serve.http.errors import ApiError
from retnet.system.checks import quoted
from retnet.system.suggest import nearest

# By field: the values that change nothing, which clients send by default, and the advice.
Refusals = dict[str, tuple[tuple[Any, ...], str]]
LONGEST_NAME = 100  # characters of an unknown field in `param`

REFUSED: Refusals = {
    "add_special_tokens": ((True,), "give token ids to control the document start"),
    "allowed_token_ids": (([],), "use structured_outputs"),
    "bad_words": (([],), "use logit_bias"),
    "cache_salt": ((), "cached prefixes are shared by the requests of one API key only"),
    "detokenize": ((True,), "the text is always returned"),
    "early_stopping": ((False,), "there is no beam search"),
    "guided_choice": ((), 'use structured_outputs: {"choice": ...}'),
    "guided_grammar": ((), 'use structured_outputs: {"grammar": ...}'),
    "guided_json": ((), 'use structured_outputs: {"json": ...}'),
    "guided_regex": ((), 'use structured_outputs: {"regex": ...}'),
    "guided_decoding_backend": ((), "grammars are compiled by llguidance"),
    "guided_whitespace_pattern": ((), "white space between the parts of a JSON text is bounded"),
    "include_stop_str_in_output": ((False,), "the text ends before a stop string"),
    "length_penalty": ((1, 1.0), "there is no beam search"),
    "logits_processors": (([],), "use logit_bias"),
    "min_tokens": ((0,), "use ignore_eos"),
    "prediction": ((), "drafts come from the context (--speculate)"),
    "priority": ((0,), "requests are served in the order of their arrival"),
    "prompt_cache_key": ((), "prefixes are found by their tokens"),
    "prompt_logprobs": ((0,), "use echo with logprobs in /v1/completions"),
    "request_id": ((), "send the header X-Request-Id"),
    "return_token_ids": ((False,), "use logprobs"),
    "return_tokens_as_token_ids": ((False,), "use logprobs"),
    "safety_identifier": ((), "use user"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "skip_special_tokens": ((True,), "special tokens have no text"),
    "spaces_between_special_tokens": ((True,), "special tokens have no text"),
    "store": ((False,), "responses are not stored; use keep_session"),
    "truncate_prompt_tokens": ((), "a prompt is never cut"),
    "use_beam_search": ((False,), "there is no beam search"),
}


def honoured(given: dict[str, Any], fields: Collection[str], refused: Refusals) -> dict[str, Any]:
    """The fields of a body that the server honours, without those that are null or change nothing.

    Raises ApiError for a field that would change something, by name.
    """
    for name, value in given.items():
        if name in fields or value is None:
            continue
        neutral, advice = refused.get(name, ((), ""))
        if any(type(value) is type(x) and value == x for x in neutral):
            continue
        if name in refused:
            accepted = ", ".join(["null", *map(_spelt, neutral)])
            raise ApiError(400, f"{name} is not honoured by this server (accepted: {accepted}); {advice}", param=name)
        near = nearest(name, fields)
        hint = f"did you mean {near}?" if near else f"accepted: {', '.join(fields)}"
        raise ApiError(400, f"{quoted(name)} is not a field of this request; {hint}", param=name[:LONGEST_NAME])
    return {name: value for name, value in given.items() if name in fields}


def _spelt(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
