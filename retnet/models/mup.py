"""muP (Yang et al. 2022, arXiv 2203.03466): a learning rate found at a narrow base width stays right at wider ones.

The rules scale a model of width D like the same model of `base_width`, with m = D / base_width. At m = 1 the model is
the ordinary one. By kind of weight (`retnet.layers.growth`), multiplied by these powers of m:

    kind                          initial weights   rate of AdamW   rate of Muon
    hidden                        m^-1/2            m^-1            m^-1/2
    readout                       m^-1              m^-1            m^-1
    input, fixed, no linear map   1                 1               1

- AdamW moves every entry by about the rate, in a direction that its inputs share, so a sum over D inputs grows like D.
  A step of Muon has full rank, as initial weights have: its largest singular value grows like sqrt(D) at the entries
  that `match_rms_adamw` gives it, and a map to few outputs adds them up over all D inputs.
- Weight decay is multiplied by the inverse of the rate's factor: a step shrinks a weight by rate times decay, which
  stays the same. AdamW's eps is divided by m, as all gradients are.
- Logits are multiplied by 1 / m (`logit_scale`). So the head is initialised and trained like the embedding, to which it
  may be tied; an untied head could have the rule of a readout instead, with equal steps.
- Scores of softmax attention are divided by the width K of a head instead of sqrt(K), where K differs from that of the
  base: queries and keys align in training, and their product grows like K. Retention keeps K^-1/2: the head norm takes
  any factor out of its output. Widths in the other dimensions (values, feed-forward, latents) grow with D.

Depth, batch size and number of tokens are those of the base: muP does not transfer across them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

from torch import nn

from retnet.layers.attention import AttentionConfig
from retnet.layers.growth import Growth
from retnet.layers.latent_attention import LatentAttentionConfig
from retnet.layers.moe import ExpertLinear, MoEConfig
from retnet.layers.retention import RetentionConfig
from retnet.layers.weight_roles import parts_of_products
from retnet.models.config import ModelConfig

LINEAR = (nn.Linear, nn.Embedding, ExpertLinear)
Algorithm = Literal["adamw", "muon"]
T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """Powers of m = width / base width."""

    init: float
    adamw: float
    muon: float


RULES: dict[Growth, Rule] = {
    "hidden": Rule(init=-0.5, adamw=-1.0, muon=-0.5),
    "readout": Rule(init=-1.0, adamw=-1.0, muon=-1.0),
    "input": Rule(0.0, 0.0, 0.0),
    "fixed": Rule(0.0, 0.0, 0.0),
}


def width_ratio(config: ModelConfig) -> float:
    """m; 1 without muP."""
    return 1.0 if config.mup_base_width is None else config.d_model / config.mup_base_width


def with_mup(config: ModelConfig, base_width: int, base_head_dim: int | None = None) -> ModelConfig:
    """The configuration under muP's rules, whose scales are set relative to those that it has.

    base_head_dim: the width of attention's heads at the base width, where it is another one; None: wider models have
    more heads, of equal width.

    Raises ValueError for a configuration that has rules already, and for one with layers whose scores would have to be
    scaled and cannot be.
    """
    if config.mup_base_width is not None:
        raise ValueError(f"mup_base_width is {config.mup_base_width} already; accepted: a configuration without muP")
    for name, value in (("base_width", base_width), ("base_head_dim", base_head_dim)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; accepted: a positive integer")
    ratio = config.d_model / base_width

    def scaled(part: Any) -> Any:
        if isinstance(part, MoEConfig) and part.router_init_std is not None:
            return replace(part, router_init_std=part.router_init_std * ratio ** RULES["readout"].init)
        return part if base_head_dim is None else _with_scores_scaled(part, base_head_dim)

    layers, mtp = _everywhere(config.layers, scaled), _everywhere(config.mtp, scaled)
    scale = config.logit_scale / ratio
    return replace(config, layers=layers, mtp=mtp, logit_scale=scale, mup_base_width=base_width)


def _with_scores_scaled(mixer: Any, base: int) -> Any:
    """Attention whose scores are of the size that they have in heads of the base's width."""
    if isinstance(mixer, AttentionConfig) and mixer.head_dim != base:
        width, usual = mixer.head_dim, mixer.head_dim**-0.5
        # Products of vectors of length 1 are at most 1, whatever their width.
        grows = 0.0 if mixer.qk_norm == "l2" else 1.0
        return replace(mixer, scale=(mixer.scale or usual) * (width / base) ** (0.5 - grows))
    if isinstance(mixer, LatentAttentionConfig) and mixer.head_dim != base:
        reason = "latent_attention has no scale of its own"
    elif isinstance(mixer, RetentionConfig) and mixer.head_norm == "none" and mixer.head_key_dim != base:
        reason = "retention without head_norm has no scale of its own"
    else:
        return mixer
    raise ValueError(f"base_head_dim is {base}, and {reason}; accepted: None, or heads of width {base}")


def _everywhere(value: T, change: Callable[[Any], Any]) -> T:
    """A configuration with every part of it changed, from the inside out."""
    if isinstance(value, tuple):
        return tuple(_everywhere(part, change) for part in value)  # pyright: ignore[reportReturnType]
    if not is_dataclass(value) or isinstance(value, type):
        return value
    parts = {field.name: getattr(value, field.name) for field in fields(value)}
    changed = {name: _everywhere(part, change) for name, part in parts.items()}
    different = {name: part for name, part in changed.items() if part is not parts[name] and part != parts[name]}
    return change(replace(value, **different) if different else value)


@dataclass(frozen=True)
class Part:
    """Rows of a weight and their kind."""

    rows: int
    growth: Growth


def growths(model: nn.Module) -> dict[nn.Parameter, tuple[Part, ...]]:
    """The kinds of the weights of all linear maps and embeddings that their owners name, in the order of their rows.

    Maps without a name are those of other packages, such as adapters.
    """
    products, found = {id(module): rows for module, rows in parts_of_products(model).items()}, {}
    for owner in model.modules():
        named: dict[str, Any] = dict.fromkeys(getattr(owner, "WEIGHT_ROLES", {}), "hidden")
        for name, kinds in (named | dict(getattr(owner, "GROWTH", {}))).items():
            owned = getattr(owner, name, None)
            weight = owned.weight if isinstance(owned, LINEAR) else owned
            if isinstance(weight, nn.Parameter):
                rows = products.get(id(owned), (weight.shape[-2],))
                each = kinds if isinstance(kinds, tuple) else (kinds,) * len(rows)
                found[weight] = tuple(Part(*part) for part in zip(rows, each, strict=True))
    return found


def check_growths(model: nn.Module) -> None:
    """Raise ValueError for a linear map whose owner does not name its kind."""
    known = growths(model)
    for name, module in model.named_modules():
        if isinstance(module, LINEAR) and module.weight not in known:
            raise ValueError(
                f"muP needs the kind of {name}; accepted: a module that names it in GROWTH ({', '.join(RULES)}) or in "
                "WEIGHT_ROLES"
            )


class Rates:
    """Factors of the learning rates of a model's parameters; all 1 without muP."""

    def __init__(self, model: nn.Module):
        configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
        self.ratio = next((width_ratio(c) for c in configs if isinstance(c, ModelConfig)), 1.0)
        self._kinds = growths(model) if self.ratio != 1.0 else {}

    def parts(self, weight: nn.Parameter, algorithm: Algorithm) -> tuple[float, ...]:
        """The factor of each map in a weight that is several; otherwise one factor."""
        kinds = self._kinds.get(weight, ())
        factors = tuple(self.ratio ** getattr(RULES[part.growth], algorithm) for part in kinds) or (1.0,)
        return factors if len(set(factors)) > 1 else factors[:1]

    def of(self, weight: nn.Parameter, algorithm: Algorithm) -> float:
        """The factor of a whole weight: AdamW's is the same in all its parts."""
        return self.parts(weight, algorithm)[0]


@dataclass(frozen=True)
class KindSummary:
    """The weights of a kind in a model, and the factors of their rule."""

    growth: Growth
    parameters: int
    init: float
    adamw: float
    muon: float


def summarize(model: nn.Module, config: ModelConfig) -> Iterator[KindSummary]:
    """Every kind that a model has; parameters that are no linear map count as inputs."""
    counts, known = dict.fromkeys(RULES, 0), growths(model)
    for weight, parts in known.items():
        for part in parts:
            counts[part.growth] += part.rows * weight.numel() // weight.shape[-2]
    counts["input"] += sum(p.numel() for p in model.parameters() if p not in known)
    ratio = width_ratio(config)
    for growth, count in counts.items():
        if count:
            rule = RULES[growth]
            yield KindSummary(growth, count, ratio**rule.init, ratio**rule.adamw, ratio**rule.muon)
