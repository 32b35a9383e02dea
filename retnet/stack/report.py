"""Warnings for valid but suspicious stacks: unusual sizes, contradictory hints, keys without effect.

A finding never stops anything; a stack that cannot be built is a validation error. Each rule is a function of its name,
and rules that EulerStack also has use EulerStack's names, so that the two reports can be compared.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from .errors import format_path, plain
from .estimate import estimate_parameters
from .load import Stack
from .mixers import Attention

# The number of tokens of well-known tokenizers, by a part of their names.
TOKENIZER_SIZES = {"gpt2": 50257, "byt5": 259, "llama-2": 32000, "gemma-2": 256000}


class Severity(StrEnum):
    """The severity of a finding."""

    WARNING = "WARNING"
    INFO = "INFO"


@dataclass(frozen=True)
class Finding:
    """A message about a valid stack, with the name of its rule."""

    severity: Severity
    rule: str
    message: str


def realism_report(stack: Stack) -> list[Finding]:
    """All findings on a stack, in the order of the rules."""
    return [Finding(severity, rule.__name__, text) for severity, rule in _RULES for text in rule(stack)]


def short_count(count: int) -> str:
    """1234567890 -> '1.23B'."""
    for size, unit, digits in ((10**12, "T", 2), (10**9, "B", 2), (10**6, "M", 1), (10**3, "K", 1)):
        if count >= size:
            return f"{count / size:.{digits}f}{unit}"
    return str(count)


Rule = Callable[[Stack], Iterator[str]]
_RULES: list[tuple[Severity, Rule]] = []


def _rule(severity: Severity) -> Callable[[Rule], Rule]:
    """Add a rule to the report; its messages are those that the function yields."""

    def add(rule: Rule) -> Rule:
        _RULES.append((severity, rule))
        return rule

    return add


@_rule(Severity.WARNING)
def head_dim_range(stack: Stack) -> Iterator[str]:
    width = stack.spec.model.head_dim
    if not 32 <= width <= 256:
        yield f"the heads have width {width}; 64 to 128 is usual, and 32 to 256 common"


@_rule(Severity.WARNING)
def target_params_mismatch(stack: Stack) -> Iterator[str]:
    target = stack.spec.model.target_params
    if target is None:
        return
    from retnet.models.cost import parameter_counts

    from .build import model_config

    built = parameter_counts(model_config(stack))["total"]
    if not 0.7 <= built / target <= 1.3:
        yield f"target_params is {short_count(target)}, the built model has {short_count(built)} ({built / target:.0%})"


@_rule(Severity.WARNING)
def moe_expert_ratio(stack: Stack) -> Iterator[str]:
    for name, template in stack.spec.layer_templates.items():
        moe = template.ffn.moe
        if moe and moe.experts > 1024:
            yield f"template '{plain(name)}' has {moe.experts} experts; the largest known models have a few hundred"
        if moe and moe.capacity_factor < 0.5:
            yield f"template '{plain(name)}': capacity_factor {moe.capacity_factor:g} drops most tokens"


@_rule(Severity.WARNING)
def affinity_consistency(stack: Stack) -> Iterator[str]:
    for name, template in stack.spec.layer_templates.items():
        moe = template.ffn.moe
        if moe and moe.score == "sqrt_softplus" and not moe.bias_correction.enabled:
            yield f"template '{plain(name)}': sqrt_softplus is meant for experts balanced by bias_correction"
        if moe and moe.affinity and "router" in moe.model_fields_set and moe.affinity != moe.router:
            yield f"template '{plain(name)}': affinity {moe.affinity} is used, not router {moe.router}"


@_rule(Severity.WARNING)
def bias_correction_disabled(stack: Stack) -> Iterator[str]:
    for name, template in stack.spec.layer_templates.items():
        correction = template.ffn.moe.bias_correction if template.ffn.moe else None
        if correction and correction.model_fields_set and not correction.enabled:
            yield f"template '{plain(name)}': bias_correction has no effect without enabled: true"


@_rule(Severity.WARNING)
def execution_modes(stack: Stack) -> Iterator[str]:
    modes = stack.spec.execution_modes
    if modes:
        names = ", ".join(plain(mode.name) for mode in modes)
        yield f"execution_modes ({names}) have no effect on the model, its training or generation"
    total, length = sum(mode.max_tokens for mode in modes or ()), stack.spec.model.max_seq_len
    if total > length:
        yield f"the max_tokens of execution_modes add up to {total}, more than max_seq_len {length}"


@_rule(Severity.WARNING)
def muon_without_optimizer(stack: Stack) -> Iterator[str]:
    hints = stack.spec.training_hints
    for key in ("muon", "optimizer_groups"):
        if hints and key in hints.model_fields_set and hints.optimizer == "adamw":
            yield f"training_hints.{key} has no effect with optimizer adamw"


@_rule(Severity.WARNING)
def seq_len_ratio(stack: Stack) -> Iterator[str]:
    model = stack.spec.model
    ratio = model.max_seq_len / model.d_model
    if ratio > 64 and any(kind == "attention" for layer in stack.layers for kind, _ in layer.mixers):
        yield f"max_seq_len is {ratio:.0f} times d_model: the KV cache of attention will be larger than the model"


@_rule(Severity.WARNING)
def dropout_regularization(stack: Stack) -> Iterator[str]:
    hints = stack.spec.training_hints
    layers = [inner for layer in stack.layers for inner in layer.inner]
    unusual = any(layer.mixer.NEEDS_REGULARISATION or (layer.ffn and layer.ffn.type == "moe") for layer in layers)
    if len(layers) > 16 and unusual and not (hints and (hints.dropout or hints.checkpointing)):
        yield f"{len(layers)} layers are trained with neither dropout nor checkpointing"


@_rule(Severity.WARNING)
def family_hint_consistency(stack: Stack) -> Iterator[str]:
    hint = (stack.spec.model.family_hint or "").lower()
    mixers = {kind for layer in stack.layers for kind, _ in layer.mixers}
    if "llama" in hint and mixers != {"attention"}:
        yield f"family_hint says llama, but the mixers are {', '.join(sorted(mixers))}"
    if "mamba" in hint and "mamba" not in mixers:
        yield f"family_hint says mamba, but the mixers are {', '.join(sorted(mixers))}"


@_rule(Severity.WARNING)
def vocab_tokenizer_consistency(stack: Stack) -> Iterator[str]:
    name, vocab_size = stack.spec.tokenizer_contract.pretrained, stack.spec.model.vocab_size
    for part, tokens in TOKENIZER_SIZES.items():
        if part in name.lower() and vocab_size < tokens:
            yield f"tokenizer '{plain(name)}' has {tokens} tokens, but vocab_size is {vocab_size}"


@_rule(Severity.WARNING)
def rope_scaling_factor(stack: Stack) -> Iterator[str]:
    scaling = stack.spec.embedding.rope_scaling
    if scaling and scaling.factor > 32:
        yield f"rope_scaling.factor {scaling.factor:g} is unusually large"


@_rule(Severity.WARNING)
def window_without_length(stack: Stack) -> Iterator[str]:
    layers = [inner for layer in stack.layers for inner in layer.inner]
    for name in dict.fromkeys(layer.template for layer in layers):
        settings = [mixer for layer in layers if layer.template == name for _, mixer in layer.mixers]
        if any(isinstance(m, Attention) and m.window_mode == "sliding" and m.window is None for m in settings):
            yield f"template '{plain(name)}' has window_mode: sliding without a window, so its attention is global"


@_rule(Severity.WARNING)
def mla_latent_dim_range(stack: Stack) -> Iterator[str]:
    width = stack.spec.model.d_model
    for name, template in stack.spec.layer_templates.items():
        mixers = template.mixer.settings.leaves(template.mixer.type)
        latents = [each.latent_dim for _, each in mixers if isinstance(each, Attention) and each.latent_dim is not None]
        for latent in latents:
            if not width / 16 <= latent <= 3 * width / 4:
                usual = f"{width // 8} to {width // 2} (d_model / 8 to d_model / 2)"
                yield f"template '{plain(name)}' has latent_dim {latent}; {usual} is usual"


@_rule(Severity.WARNING)
def hyper_connections(stack: Stack) -> Iterator[str]:
    for name, template in stack.spec.layer_templates.items():
        hyper = template.residual.hyper if template.residual else None
        if hyper is None:
            continue
        if hyper.mixing != "birkhoff" and "sinkhorn_iters" in hyper.model_fields_set and hyper.sinkhorn_iters:
            yield f"template '{plain(name)}': sinkhorn_iters has no effect with mixing: {hyper.mixing}"
        if hyper.expand == 1:
            yield f"template '{plain(name)}': expand: 1 is one residual stream, with weights but nothing to mix"


@_rule(Severity.WARNING)
def reserved_namespace(stack: Stack) -> Iterator[str]:
    for key in stack.reserved:
        place = f" (line {key.mark.line}, column {key.mark.column})" if key.mark else ""
        yield f"{format_path(key.path)} has a reserved prefix and no effect{place}"


@_rule(Severity.WARNING)
def unused_template(stack: Stack) -> Iterator[str]:
    mtp = stack.spec.head.mtp
    used = {inner.template for layer in stack.layers for inner in layer.inner} | ({mtp.head_template} if mtp else set())
    for name in stack.spec.layer_templates:
        if name not in used:
            yield f"template '{plain(name)}' is not in layer_schedule"


@_rule(Severity.INFO)
def param_count_info(stack: Stack) -> Iterator[str]:
    estimate = estimate_parameters(stack.spec, stack.layers)
    yield f"EulerStack's estimate: {short_count(estimate)} parameters ({estimate:,})"


@_rule(Severity.INFO)
def layer_count_info(stack: Stack) -> Iterator[str]:
    kinds = [inner.mixer_type for layer in stack.layers for inner in layer.inner]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    yield f"{len(kinds)} layers: {counts}"
