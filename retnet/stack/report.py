"""What a valid stack makes one look twice at: unusual sizes, promises its layers do not keep, keys that do nothing.

A finding never stops anything: what cannot be built is an error of validation. Rules that EulerStack has too carry its
names, so that both reports can be compared.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from .errors import format_path, plain
from .estimate import estimate_parameters
from .load import Stack
from .mixers import Attention

# Tokens of tokenizers whose name tells: fewer rows in the embedding cannot hold them.
TOKENIZER_SIZES = {"gpt2": 50257, "byt5": 259, "llama-2": 32000, "gemma-2": 256000}


class Severity(StrEnum):
    """How loud a finding is."""

    WARNING = "WARNING"
    INFO = "INFO"


@dataclass(frozen=True)
class Finding:
    """One remark on a valid stack, under its rule's name."""

    severity: Severity
    rule: str
    message: str


def realism_report(stack: Stack) -> list[Finding]:
    """All findings on a stack, in the order of the rules."""
    return [Finding(severity, name, message) for name, (severity, rule) in _RULES.items() for message in rule(stack)]


def short_count(count: int) -> str:
    """1234567890 -> '1.23B'."""
    for size, unit, digits in ((10**12, "T", 2), (10**9, "B", 2), (10**6, "M", 1), (10**3, "K", 1)):
        if count >= size:
            return f"{count / size:.{digits}f}{unit}"
    return str(count)


Rule = Callable[[Stack], Iterator[str]]


def _head_dim(stack: Stack) -> Iterator[str]:
    width = stack.spec.model.head_dim
    if not 32 <= width <= 256:
        yield f"a head is {width} wide; 64 to 128 is usual, 32 to 256 common"


def _target_params(stack: Stack) -> Iterator[str]:
    target = stack.spec.model.target_params
    estimate = estimate_parameters(stack.spec, stack.layers)
    if target is not None and not 0.7 <= estimate / target <= 1.3:
        yield f"target_params is {short_count(target)}, the estimate {short_count(estimate)} ({estimate / target:.0%})"


def _moe(stack: Stack) -> Iterator[str]:
    for name, template in stack.spec.layer_templates.items():
        moe = template.ffn.moe
        if moe and moe.experts > 1024:
            yield f"template '{plain(name)}' has {moe.experts} experts; the largest models known have a few hundred"
        if moe and moe.capacity_factor < 0.5:
            yield f"template '{plain(name)}': capacity_factor {moe.capacity_factor:g} drops most tokens' experts"


def _sequence(stack: Stack) -> Iterator[str]:
    model = stack.spec.model
    ratio = model.max_seq_len / model.d_model
    if ratio > 64 and any(layer.mixer_type == "attention" for layer in stack.layers):
        yield f"max_seq_len is {ratio:.0f} times d_model: the attention layers' cache will outweigh the model"


def _regularisation(stack: Stack) -> Iterator[str]:
    hints = stack.spec.training_hints
    unusual = any(layer.mixer.NEEDS_REGULARISATION or layer.ffn.type == "moe" for layer in stack.layers)
    if len(stack.layers) > 16 and unusual and not (hints and (hints.dropout or hints.checkpointing)):
        yield f"{len(stack.layers)} layers train without dropout and without checkpointing"


def _family(stack: Stack) -> Iterator[str]:
    hint = (stack.spec.model.family_hint or "").lower()
    mixers = {layer.mixer_type for layer in stack.layers}
    if "llama" in hint and mixers != {"attention"}:
        yield f"family_hint says llama, the mixers are {', '.join(sorted(mixers))}"
    if "mamba" in hint and "mamba" not in mixers:
        yield f"family_hint says mamba, the mixers are {', '.join(sorted(mixers))}"


def _vocabulary(stack: Stack) -> Iterator[str]:
    name, vocab_size = stack.spec.tokenizer_contract.pretrained, stack.spec.model.vocab_size
    for part, tokens in TOKENIZER_SIZES.items():
        if part in name.lower() and vocab_size < tokens:
            yield f"tokenizer '{plain(name)}' has {tokens} tokens, vocab_size is {vocab_size}"


def _rope_factor(stack: Stack) -> Iterator[str]:
    scaling = stack.spec.embedding.rope_scaling
    if scaling and scaling.factor > 32:
        yield f"rope_scaling.factor {scaling.factor:g} stretches positions very far"


def _window(stack: Stack) -> Iterator[str]:
    for name in dict.fromkeys(layer.template for layer in stack.layers):
        settings = [layer.mixer for layer in stack.layers if layer.template == name]
        if any(isinstance(m, Attention) and m.window_mode == "sliding" and m.window is None for m in settings):
            yield f"template '{plain(name)}' says window_mode: sliding but gives no window: its attention is global"


def _reserved(stack: Stack) -> Iterator[str]:
    for key in stack.reserved:
        place = f" (line {key.mark.line}, column {key.mark.column})" if key.mark else ""
        yield f"{format_path(key.path)} is under a reserved prefix and does nothing{place}"


def _unread(stack: Stack) -> Iterator[str]:
    for name in stack.spec.layer_templates:
        if not any(layer.template == name for layer in stack.layers):
            yield f"template '{plain(name)}' is never scheduled"


def _parameters(stack: Stack) -> Iterator[str]:
    estimate = estimate_parameters(stack.spec, stack.layers)
    yield f"EulerStack's estimate: {short_count(estimate)} parameters ({estimate})"


def _layers(stack: Stack) -> Iterator[str]:
    kinds = [layer.mixer_type for layer in stack.layers]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    yield f"{len(kinds)} layers: {counts}"


_RULES: dict[str, tuple[Severity, Rule]] = {
    "head_dim_range": (Severity.WARNING, _head_dim),
    "target_params_mismatch": (Severity.WARNING, _target_params),
    "moe_expert_ratio": (Severity.WARNING, _moe),
    "seq_len_ratio": (Severity.WARNING, _sequence),
    "dropout_regularization": (Severity.WARNING, _regularisation),
    "family_hint_consistency": (Severity.WARNING, _family),
    "vocab_tokenizer_consistency": (Severity.WARNING, _vocabulary),
    "rope_scaling_factor": (Severity.WARNING, _rope_factor),
    "window_without_length": (Severity.WARNING, _window),
    "unused_template": (Severity.WARNING, _unread),
    "reserved_namespace": (Severity.WARNING, _reserved),
    "param_count_info": (Severity.INFO, _parameters),
    "layer_count_info": (Severity.INFO, _layers),
}
