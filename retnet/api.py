"""The public functions: load a model, load its tokenizer, generate text.

    import retnet

    model = retnet.load("runs/wikipedia")
    print(retnet.generate(model, "The river", max_tokens=50))

For many requests at once, or states to keep, there is `retnet.Engine`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from retnet.data.tokenizer import Tokenizer
from retnet.data.tokenizer_json import find_tokenizer
from retnet.models.decode.generation import PROMPT_CHUNK
from retnet.models.decode.sampling import Sampling
from retnet.models.lm import LanguageModel
from retnet.models.snapshot import Snapshot
from retnet.ops.dtypes import resolve_dtype
from retnet.serve.engine import Engine
from retnet.serve.pool import growing_layer
from retnet.serve.request import Request
from retnet.serve.speculation import Speculation
from retnet.serve.stopping import StopStrings
from retnet.stack.resolve import resolve_model, resolve_tokenizer, tokenizer_of
from retnet.system.checks import is_integer

Model = str | os.PathLike[str] | LanguageModel
Prompt = str | bytes | Sequence[int] | Tensor


def load(
    model: str | os.PathLike[str], device: torch.device | str = "auto", dtype: torch.dtype | str | None = None
) -> LanguageModel:
    """A model, in evaluation mode.

    Args:
        model: a preset's name, a stack file (fresh weights for both), or a saved directory. A preset's name takes
            precedence over a directory of that name; a path object is never a preset.
        device: "auto" is the GPU if there is one, otherwise the CPU.
        dtype: of the weights, a torch dtype or its name ("bfloat16"); as saved if None.

    Raises ValueError or FileNotFoundError for a name that is no model of ours, for weights that do not fit their
    configuration, and for a device that is not there.

    Examples:
        >>> retnet.load("retnet-tiny", device="cpu", dtype="bfloat16").embedding.weight.dtype
        torch.bfloat16
    """
    return resolve_model(model_name(model), device=device, dtype=resolve_dtype(dtype))


def load_tokenizer(model: Model) -> Tokenizer:
    """The tokenizer of a model: the one saved beside its weights, otherwise bytes.

    model: as for `load`, or a loaded model, which remembers its directory (`LanguageModel.directory`).

    Raises ValueError for a model without a tokenizer whose vocabulary is not bytes, FileNotFoundError for no model.

    Examples:
        >>> tokenizer = retnet.load_tokenizer("retnet-tiny")
        >>> tokenizer.encode("héllo"), tokenizer.decode([104, 195, 169])
        ([104, 195, 169, 108, 108, 111], 'hé')
    """
    if not isinstance(model, LanguageModel):
        return resolve_tokenizer(model_name(model))
    return tokenizer_of(model.config, model.directory)


@overload
def generate(model: Model, prompt: Prompt = ..., *, stream: Literal[False] = ..., **options: Any) -> str: ...
@overload
def generate(model: Model, prompt: Prompt = ..., *, stream: Literal[True], **options: Any) -> Iterator[str]: ...
def generate(  # pyright: ignore[reportInconsistentOverload] (the overloads leave the options to this signature)
    model: Model,
    prompt: Prompt = "",
    *,
    stream: bool = False,
    max_tokens: int | None = 256,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    speculate: int = 0,
    drafts: str = "auto",
    state: Snapshot | str | os.PathLike[str] | None = None,
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
) -> str | Iterator[str]:
    """The continuation of a prompt.

    Args:
        model: as for `load`, or a loaded model, which saves loading it for every call.
        prompt: text, which is read after the document start; or token ids, which are read as they are.
        stream: return an iterator over pieces of the text, each as soon as it is certain, instead of the whole text.
        max_tokens: new tokens at most; None for no limit (with `stream`).
        temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, seed: see `Sampling`;
            temperature 0 takes the likeliest token, and the same seed gives the same text.
        stop: strings that end the text, and are left out of it. The end-of-text token of the model or its tokenizer
            ends it too.
        speculate: draft tokens per step (3, 7, 11, ...), which are verified; 0: none.
        drafts: their source: "mtp", the model's multi-token prediction; "context", earlier text; "auto", mtp where the
            model has it.
        state: a snapshot or its file: the learned initial state that the prompt is read after (`retnet train
            method=state`), or an earlier text that it continues.
        tokenizer: in place of the model's own; or what names one, as in `retnet data --tokenizer`.

    Raises ValueError for a model without a tokenizer, for options out of range, for a state of another model, and for
    an endless text of a model whose cache grows; retnet.serve.request.Failed if the model's logits are not finite.

    Examples:
        >>> model = retnet.load("retnet-tiny")
        >>> text = retnet.generate(model, "def main(", max_tokens=20, temperature=0)
        >>> for piece in retnet.generate(model, "def main(", stop="\\n", seed=1, stream=True):
        ...     print(piece, end="", flush=True)
    """
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
    )
    if max_tokens is None and not stream:
        raise ValueError("max_tokens is None without stream, which would never return; accepted: an integer")
    if max_tokens is not None and not is_integer(max_tokens, 1):
        raise ValueError(f"max_tokens is {max_tokens!r}; accepted: 1 or more, or None with stream")
    if not isinstance(model, LanguageModel):
        tokenizer = load_tokenizer(model) if tokenizer is None else tokenizer
        model = load(model)
    found = as_tokenizer(model, tokenizer)
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    after = load_state(state, model)
    request = request_of(prompt, found, max_tokens, sampling, stops, after)
    engine = engine_for(model, request, found, speculate, after, drafts)
    pieces = stream_text(engine.stream(request, after), found, stops, request.prompt)
    return pieces if stream else "".join(pieces)


def model_name(model: str | os.PathLike[str]) -> str:
    """A model as `retnet.stack.resolve` takes it: text as written, a path object as a path that no preset is named."""
    if isinstance(model, str):
        return model
    if isinstance(model, os.PathLike):
        return os.path.join(os.curdir, model)  # an absolute path stays as it is
    raise ValueError(
        f"model is of type {type(model).__name__}; accepted: a preset's name, the path of a stack file or a saved "
        "directory, and, once loaded, a LanguageModel (of transformers' RetNetForCausalLM: its `model`)"
    )


def as_tokenizer(model: LanguageModel, tokenizer: Tokenizer | str | os.PathLike[str] | None) -> Tokenizer:
    """The tokenizer given or named; without one that of the model."""
    if tokenizer is None:
        return load_tokenizer(model)
    if isinstance(tokenizer, (str, os.PathLike)):
        return find_tokenizer(os.fspath(tokenizer))
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(
            f"tokenizer is of type {type(tokenizer).__name__}; accepted: a retnet Tokenizer, bytes, a tokenizer.json, "
            "a directory with one, or a model of the Hugging Face hub"
        )
    return tokenizer


def token_ids(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a prompt: of text with the document start before them, of token ids as they are."""
    if isinstance(prompt, (str, bytes, bytearray)):
        return tokenizer.encode(bytes(prompt) if isinstance(prompt, bytearray) else prompt, start=True)
    if isinstance(prompt, Tensor):
        if prompt.dim() != 1 or prompt.is_floating_point():
            raise ValueError(f"prompt is {prompt.dtype} {list(prompt.shape)}; accepted: text, or token ids [T]")
        return prompt.tolist()
    try:
        return list(prompt)
    except TypeError as error:
        raise ValueError(f"prompt is {prompt!r}; accepted: text, or token ids [T]") from error


def load_state(state: Snapshot | str | os.PathLike[str] | None, model: LanguageModel) -> Snapshot | None:
    """A snapshot, read from its file where one is named, on the model's device."""
    if state is None or isinstance(state, Snapshot):
        return state
    return Snapshot.load(os.fspath(state), model.embedding.weight.device)


def request_of(
    prompt: Prompt,
    tokenizer: Tokenizer,
    max_tokens: int | None,
    sampling: Sampling,
    stops: Sequence[str],
    after: Snapshot | None = None,
) -> Request:
    """The request for a prompt's continuation, which the tokenizer's document end stops too.

    after: a snapshot that it continues. It has the document start already, so a text is read without another.
    """
    end = tokenizer.document_end
    stop_tokens = () if end is None else (end,)
    tokens = token_ids(prompt, tokenizer)
    if after is not None and isinstance(prompt, (str, bytes, bytearray)):
        tokens = tokens[1:]
    return Request(tokens, max_tokens, sampling, stop_tokens, stops)


def engine_for(
    model: LanguageModel,
    request: Request,
    tokenizer: Tokenizer,
    speculate: int = 0,
    after: Snapshot | None = None,
    drafts: str = "auto",
) -> Engine:
    """An engine with room for one request, which continues `after`, if given.

    Raises ValueError for an endless text of a model whose cache grows.
    """
    limit, growing = request.max_new_tokens, growing_layer(model.config)
    if limit is None and growing is not None:
        raise ValueError(
            f"the text has no limit and layer {growing} is attention without a window, whose cache grows; accepted "
            "with this model: a maximum of 1 new token or more"
        )
    earlier = 0 if after is None else len(after.tokens)
    return Engine(
        model,
        num_slots=1,
        max_tokens=None if limit is None else earlier + len(request.prompt) + limit,
        prompt_chunk=PROMPT_CHUNK,
        prompt_budget=PROMPT_CHUNK,
        decode=tokenizer.decode,
        speculation=Speculation.of(speculate, drafts, model.config),
    )


def stream_text(
    tokens: Iterator[int], tokenizer: Tokenizer, stop: Sequence[str] = (), after: Sequence[int] = ()
) -> Iterator[str]:
    """The text of tokens as they come, up to the first stop string, in pieces that are not empty.

    after: the tokens before them, whose text this one continues.
    """
    watch = StopStrings(stop, tokenizer.stream_decoder(), after)
    for token in tokens:
        watch.push(token)
        if piece := watch.take():
            yield piece
        if watch.matched is not None:
            return
    watch.flush()
    if piece := watch.take(all=True):
        yield piece
