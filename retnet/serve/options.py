"""Options of an engine: each is checked before anything is allocated, and its message says what is accepted."""

import math

import torch

from retnet.layers.moe import MoE
from retnet.models.lm import LanguageModel
from retnet.serve.speculation import Speculation
from retnet.system.checks import is_integer, quoted

# Prompt tokens per call. A GPU needs many to be busy; on a CPU running requests wait for them.
PROMPT_CHUNKS = {"cpu": 256, "cuda": 2048}
DEFERRED_WRITES = (16, 32, 64)  # lengths that tensor cores can sum over
MOST = 2**40  # slots and tokens of a slot, so that sizes in bytes fit 64 bits


def check_model(model: object) -> None:
    """Raise ValueError unless the model can be served: a LanguageModel with values, in evaluation mode."""
    if not isinstance(model, LanguageModel):
        inner = ", here its `model`" if isinstance(getattr(model, "model", None), LanguageModel) else ""
        raise ValueError(f"model is of type {type(model).__name__}; accepted: a LanguageModel{inner}")
    if model.embedding.weight.device.type == "meta":
        raise ValueError("model has no values, on device meta; accepted: a model on a CPU or a GPU")
    check_in_evaluation_mode(model)


def check_in_evaluation_mode(model: LanguageModel) -> None:
    """Raise ValueError for a model in training mode."""
    if model.training:
        raise ValueError("the model is in training mode; accepted: evaluation mode (model.eval())")


def counts(low: int = 1, high: int | None = None, **given: object) -> list[int | None]:
    """The options given by name as integers of `low` to `high`; None stays."""
    for name, value in given.items():
        if value is not None and not is_integer(value, low, math.inf if high is None else high):
            limits = f"of {low} or more" if high is None else f"of {low} to {high}"
            raise ValueError(f"{name} is {quoted(value)}; accepted: an integer {limits}, or None")
    return [None if value is None else int(value) for value in given.values()]  # type: ignore[call-overload] (integers)


def prompt_options(
    device: torch.device, prompt_chunk: object, prompt_budget: object, prefix_interval: object
) -> tuple[int, int, int | None]:
    """The three as integers: the chunk for the device if none is given, and the budget of one chunk."""
    chunk, budget, interval = counts(
        prompt_chunk=prompt_chunk, prompt_budget=prompt_budget, prefix_interval=prefix_interval
    )
    if chunk is None:
        chunk = PROMPT_CHUNKS.get(device.type, PROMPT_CHUNKS["cpu"])
    if interval is not None and interval % chunk:
        raise ValueError(
            f"prefix_interval is {quoted(interval)}; accepted: a multiple of prompt_chunk ({quoted(chunk)})"
        )
    return chunk, chunk if budget is None else budget, interval


def check_decode(decode: object) -> None:
    """Raise ValueError unless it is a function or None."""
    if decode is not None and not callable(decode):
        raise ValueError(f"decode is {quoted(decode)}; accepted: a function of token ids that returns text, or None")


def check_speculation(speculation: object, model: LanguageModel, max_tokens: int | None) -> None:
    """Raise ValueError for options of speculation that the model or the length of a slot does not allow."""
    if speculation is None:
        return
    if not isinstance(speculation, Speculation):
        raise ValueError(f"speculation is {quoted(speculation)}; accepted: a Speculation, or None")
    speculation.check(model.config, max_tokens)


def checked_deferred_writes(length: object, speculation: Speculation | None) -> int:
    """The option as an integer. Raises ValueError for other lengths, and for any with speculation."""
    accepted = (0, *DEFERRED_WRITES)
    if not is_integer(length, 0) or length not in accepted:
        raise ValueError(f"deferred_writes is {quoted(length)}; accepted: {', '.join(map(str, accepted))}")
    if length and speculation is not None:
        raise ValueError(
            f"deferred_writes is {length} with speculation, which defers its own writes; accepted: one of the two"
        )
    return int(length)  # type: ignore[call-overload] (an integer)


def use_graphs(asked: object, model: LanguageModel) -> bool:
    """Whether to capture graphs: by default on a GPU, except for mixtures of experts."""
    device = model.embedding.weight.device
    on_gpu = device.type == "cuda"
    routed = next((name.rpartition(".")[0] for name, module in model.named_modules() if isinstance(module, MoE)), None)
    if not (asked is None or isinstance(asked, bool)):
        raise ValueError(f"graphs is {quoted(asked)}; accepted: True, False or None")
    if asked and not on_gpu:
        raise ValueError(f"graphs is True for a model on {device}; accepted there: False or None")
    if asked and routed is not None:
        raise ValueError(
            f"graphs is True and {routed} has a mixture of experts, whose shapes depend on its routing; accepted: "
            "False or None"
        )
    return on_gpu and routed is None if asked is None else asked
