"""A naive reference of the engine, from the documented definitions: whole forwards in float64, sampling in NumPy.

Nothing of the engine or of its sampling is used. The forwards read the engine's own output, and each of its tokens must
be the one that the reference picks after those before it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from retnet.models.decode.sampling import Sampling
from retnet.serve.logprobs import TokenLogprobs
from retnet.serve.request import Generation

from .automaton import Automaton

NEAR = 1e-5  # a decision as close as this may fall either way: the engine samples in float32
MASK = 2**64 - 1


@dataclass
class Case:
    """A generation, the tokens before its output, where the output that penalties count began, and what ends it.

    earlier: tokens of a snapshot, before the prompt. grammar: what the output follows.
    """

    generation: Generation
    context: list[int]
    counted_from: int
    ends: frozenset[int]
    earlier: int = 0
    grammar: Automaton | None = None


def uniform(seed: int, position: int) -> float:
    """splitmix64 of the mixed seed, advanced by position + 1 increments; its highest 40 bits as a fraction."""

    def mix(x: int) -> int:
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
        return x ^ x >> 31

    return (mix((mix(seed) + (position + 1) * 0x9E3779B97F4A7C15) & MASK) >> 24) / 2**40


def pick(
    logits: np.ndarray, position: int, seen: set[int], output: list[int], sampling: Sampling, seed: int
) -> tuple[int, float]:
    """The next token, and how far the closest decision was from falling otherwise. seen: what repetition counts."""
    z = logits.copy()
    for token in seen:
        z[token] = z[token] / sampling.repetition_penalty if z[token] > 0 else z[token] * sampling.repetition_penalty
    for token in output:
        z[token] -= sampling.frequency_penalty
    for token in set(output):
        z[token] -= sampling.presence_penalty
    for token, bias in sampling.logit_bias.items():
        z[token] += bias
    order = sorted(np.flatnonzero(np.isfinite(z)).tolist(), key=lambda token: -z[token])
    if sampling.temperature == 0:
        return order[0], z[order[0]] - z[order[1]] if len(order) > 1 else np.inf
    z = z / sampling.temperature
    weight = np.exp(z - z[order[0]])
    kept, margin = order, np.inf
    if sampling.top_k is not None and sampling.top_k < len(order):
        kept = order[: sampling.top_k]
        margin = min(margin, weight[kept[-1]] - weight[order[sampling.top_k]])
    if sampling.top_p is not None and sampling.top_p < 1:
        sums = np.cumsum(weight[kept]) / weight[kept].sum()
        margin = min(margin, np.abs(sums - sampling.top_p).min())
        kept = kept[: 1 + int(np.sum(sums < sampling.top_p))]
    if sampling.min_p is not None:
        margin = min([margin, *(abs(weight[token] - sampling.min_p) for token in kept[1:])])
        kept = [kept[0], *(token for token in kept[1:] if weight[token] >= sampling.min_p)]
    mass = np.zeros(len(z))
    mass[kept] = weight[kept] / weight[kept].sum()
    sums, drawn = np.cumsum(mass), uniform(seed, position)
    chosen = int(np.sum(sums <= drawn * sums[-1]))
    return chosen, min(margin, np.abs(sums - drawn)[mass > 0][:-1].min(initial=np.inf))


def stop_in(text: str, strings: tuple[str, ...]) -> tuple[int, str] | None:
    """The first place of a stop string, and the string."""
    return min(((text.find(string), string) for string in strings if string in text), default=None)


@torch.no_grad()
def check(model: torch.nn.Module, cases: list[Case], text_of: Callable[[list[int]], str]) -> int:
    """Check whole outputs, log-probabilities, texts and endings; returns how many tokens were too close to tell."""
    close = 0
    ids = [[*case.context, *case.generation.tokens] for case in cases]
    for start in range(0, len(cases), 64):  # by length, so that little is padded
        batch = sorted(range(len(cases)), key=lambda i: len(ids[i]))[start : start + 64]
        longest = max(len(ids[i]) for i in batch)
        padded = torch.tensor([ids[i] + [0] * (longest - len(ids[i])) for i in batch])
        for i, logits in zip(batch, model(padded).logits.numpy(), strict=True):
            close += _check_one(cases[i], logits, text_of)
    return close


def _check_one(case: Case, whole: np.ndarray, text_of: Callable[[list[int]], str]) -> int:
    generation, request, seed = case.generation, case.generation.request, case.generation.seed
    seen, tokens, close = list(case.context), generation.tokens, 0
    _check_prompt_logprobs(case, whole)
    assert list(generation.seen) == [*case.context, *tokens]
    for t, token in enumerate(tokens):
        assert _reason(case, tokens[:t], text_of) is None, f"{t} tokens already end {request}"
        row, output = whole[len(seen) - 1], seen[case.counted_from :]
        counted = {*(seen if request.counted is None else request.counted), *output}
        expected, margin = pick(_masked(case, row, tokens[:t]), len(seen), counted, output, request.sampling, seed)
        assert token == expected or margin < NEAR, f"token {t} is {token}, not {expected}: {request}, {case}"
        close += token != expected
        _check_logprobs(generation, t, token, row)
        seen.append(token)
    reason = _reason(case, tokens, text_of)
    if generation.finish_reason == "cancelled":
        assert not tokens or reason in (None, "failed"), f"cancelled after its end, {reason}: {request}"
    else:
        assert generation.finish_reason == reason, f"{generation.finish_reason}, not {reason}: {request}"
    if request.stop_strings:
        text = text_of(tokens[:-1] if generation.finish_reason == "stop_token" else tokens)
        stop = stop_in(text, request.stop_strings) if generation.finish_reason == "stop_string" else None
        assert generation.text == (text if stop is None else text[: stop[0]])
    else:
        assert generation.text is None
    return close


def _masked(case: Case, logits: np.ndarray, tokens: list[int]) -> np.ndarray:
    if case.grammar is None:
        return logits
    allowed = case.grammar.allowed(tokens)
    return np.array([z if token in allowed else -np.inf for token, z in enumerate(logits)])


def _reason(case: Case, tokens: list[int], text_of: Callable[[list[int]], str]) -> str | None:
    """Why an output ends after these tokens."""
    request = case.generation.request
    if tokens and tokens[-1] in case.ends:
        return "stop_token"
    if request.stop_strings and stop_in(text_of(tokens), request.stop_strings) is not None:
        return "stop_string"
    if case.grammar is not None and case.grammar.ends(tokens):
        return "grammar_end"
    if len(tokens) == request.max_new_tokens:
        return "length"
    if case.grammar is not None:
        banned = {token for token, bias in request.sampling.logit_bias.items() if bias == -np.inf}
        if case.grammar.allowed(tokens) <= banned:
            return "failed"  # at the next token
    return None


def _check_logprobs(generation: Generation, t: int, token: int, logits: np.ndarray) -> None:
    wanted = generation.request.sampling.logprobs
    if wanted is None:
        assert generation.logprobs == []
        return
    assert len(generation.logprobs) == len(generation.tokens)
    _check_reported(generation.logprobs[t], token, logits, wanted)


def _check_prompt_logprobs(case: Case, logits: np.ndarray) -> None:
    request, reported = case.generation.request, case.generation.prompt_logprobs
    if request.prompt_logprobs is None:
        assert reported == []
        return
    if not case.earlier and reported:
        assert reported[0] is None
    if case.generation.finish_reason != "cancelled" or case.generation.tokens:
        assert len(reported) == len(request.prompt)
    for t, found in enumerate(reported, case.earlier):
        if t:
            _check_reported(found, case.context[t], logits[t - 1], request.prompt_logprobs)


def _check_reported(reported: TokenLogprobs, token: int, logits: np.ndarray, wanted: int) -> None:
    logprobs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    assert abs(reported.logprob - logprobs[token]) < NEAR
    values = list(reported.top.values())
    assert len(values) == wanted
    assert np.allclose(values, np.sort(logprobs)[::-1][:wanted], atol=NEAR)
    assert np.allclose(values, logprobs[list(reported.top)], atol=NEAR)
