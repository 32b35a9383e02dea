"""`type: retnet`: multi-scale retention (arXiv 2307.08621), and its gated form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import Field

from retnet.plots.palette import COLOURS, Fill

from ..errors import Fault, show
from ..scalars import ONE_OF, Decay, Flag, MaybePositiveInt, Positive, PositiveIntOrNull
from ..section import OURS
from .settings import MixerSettings, partial_rotation_faults

if TYPE_CHECKING:
    from retnet.layers.retention import RetentionConfig
    from retnet.models.config import ModelConfig

    from ..schema import Embedding, Model, Spec


class Retnet(MixerSettings):
    """Keys with the prefix `vendor.retnet.` are ours, with the paper's defaults; `RetentionConfig` explains them."""

    STATE_KEY = "kv_cache"
    GUIDE = "retnet"
    COLOUR: ClassVar[str] = COLOURS["retention"]
    ALSO_CALLED: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("gamma", "gammas", "decays", "decay_rate"), "decay"),
        **dict.fromkeys(("conv", "d_conv", "conv_size"), "conv_width"),
        "output_gate": "gate",
    }

    chunkwise: Flag = True
    # A hint on a GPU, where the kernels have chunk sizes of their own. EulerStack's files often give 64 or 128.
    chunk_size: PositiveIntOrNull = None
    rope: Flag = True
    key_dim: MaybePositiveInt = Field(default=None, alias=OURS + "key_dim")  # over all heads; default d_model
    value_dim: MaybePositiveInt = Field(default=None, alias=OURS + "value_dim")  # over all heads; default 2 d_model
    decay: Decay = Field(default="paper", alias=OURS + "decay")
    decay_scale: Positive = Field(default=1.0, alias=OURS + "decay_scale")
    learnable_decay: Flag = Field(default=False, alias=OURS + "learnable_decay")
    decay_norm: Flag = Field(default=False, alias=OURS + "decay_norm")
    rotary: Annotated[Literal["interleaved", "half"], ONE_OF] = Field(default="interleaved", alias=OURS + "rotary")
    rotary_dim: MaybePositiveInt = Field(default=None, alias=OURS + "rotary_dim")
    conv_width: MaybePositiveInt = Field(default=None, alias=OURS + "conv_width")
    conv_on: Annotated[Literal["qkv", "qk", "qv", "kv", "q", "k", "v"], ONE_OF] = Field(
        default="qkv", alias=OURS + "conv_on"
    )
    conv_activation: Annotated[Literal["silu", "none"], ONE_OF] = Field(default="silu", alias=OURS + "conv_activation")
    qkv_activation: Annotated[Literal["silu", "none"], ONE_OF] = Field(default="none", alias=OURS + "qkv_activation")
    qk_norm: Annotated[Literal["rms", "l2", "none"], ONE_OF] = Field(default="none", alias=OURS + "qk_norm")
    gated_start: Annotated[Literal["paper", "experiment", "none"], ONE_OF] = Field(
        default="none", alias=OURS + "gated_start"
    )
    gate: Annotated[Literal["swish", "sigmoid", "none"], ONE_OF] = Field(default="swish", alias=OURS + "gate")
    head_norm: Annotated[Literal["layer", "rms", "none"], ONE_OF] = Field(default="layer", alias=OURS + "head_norm")
    head_norm_affine: Annotated[Literal["none", "shared", "per_head"], ONE_OF] = Field(
        default="none", alias=OURS + "head_norm_affine"
    )
    head_norm_eps: Positive = Field(default=1e-6, alias=OURS + "head_norm_eps")
    head_norm_groups: MaybePositiveInt = Field(default=None, alias=OURS + "head_norm_groups")

    def config(self, spec: Spec) -> RetentionConfig:
        from retnet.layers.retention import RetentionConfig

        return RetentionConfig(
            num_heads=spec.model.n_heads,
            key_dim=self.key_dim or spec.model.d_model,
            value_dim=self.value_dim or 2 * spec.model.d_model,
            decay=self.decay,
            decay_scale=self.decay_scale,
            learnable_decay=self.learnable_decay,
            decay_norm=self.decay_norm,
            rotary=self.rotary if self.rope else "none",
            rotary_dim=self.rotary_dim,
            conv_width=self.conv_width,
            conv_on=cast(Any, tuple(self.conv_on)),
            conv_activation=self.conv_activation,
            qkv_activation=self.qkv_activation,
            qk_norm=self.qk_norm,
            gated_start=None if self.gated_start == "none" else self.gated_start,
            gate=self.gate,
            head_norm=self.head_norm,
            head_norm_affine=self.head_norm_affine,
            head_norm_eps=self.head_norm_eps,
            head_norm_groups=self.head_norm_groups,
            mode="chunkwise" if self.chunkwise else "parallel",
            chunk_size=self.chunk_size,
            **spec.rotary(),
        )

    def family(self, name: str) -> tuple[str, Fill]:
        return (f"{name}, gated", Fill(COLOURS["gated retention"])) if self._is_gated else super().family(name)

    @property
    def _is_gated(self) -> bool:
        return self.decay == "gated"

    @property
    def reach_depends_on_input(self) -> bool:
        return self._is_gated

    @property
    def reaches_all(self) -> bool:
        return self.decay == "none"

    def words(self, name: str) -> str:
        decay = self.decay if isinstance(self.decay, str) else "custom"
        start = "" if self.gated_start == "none" else f" from {self.gated_start}"
        parts = {
            f"{decay} decay{start}": decay != "paper",
            f"rotation of {self.rotary_dim}": self.rotary_dim is not None,
            f"decay scaled by {self.decay_scale:g}": self.decay_scale != 1,
            f"convolution of {self.conv_width}": self.conv_width is not None,
            f"{self.qkv_activation} of q, k and v": self.qkv_activation != "none",
            f"{self.qk_norm} norm of q and k": self.qk_norm != "none",
            f"head norm over {self.head_norm_groups} groups of heads": self.head_norm_groups is not None,
            "no gate" if self.gate == "none" else f"{self.gate} gate": self.gate != "swish",
        }
        return ", ".join([name, *(part for part, given in parts.items() if given)])

    def faults(self, model: Model | None, embedding: Embedding | None) -> Iterator[Fault]:
        if self.rope and embedding is not None and embedding.positional != "rope":
            what = f"rope needs embedding.positional rope, not {embedding.positional}"
            yield Fault(("rope",), what, "write rope: false here, or embedding.positional: rope")
        if model is not None:
            yield from self._widths(model)
            groups = self.head_norm_groups
            if groups is not None and model.n_heads % groups:
                what = f"{model.n_heads} heads (n_heads) are not {groups} equal groups"
                yield Fault((OURS + "head_norm_groups",), what, f"write a divisor of {model.n_heads}")
            if isinstance(self.decay, tuple) and len(self.decay) != model.n_heads:
                what = f"{len(self.decay)} gammas for {model.n_heads} heads"
                yield Fault((OURS + "decay",), what, f"write {model.n_heads} numbers, or one without brackets")
        gammas = self.decay if isinstance(self.decay, tuple) else (self.decay,)
        if self.learnable_decay and any(gamma in ("none", "gated", 0.0, 1.0) for gamma in gammas):
            what = f"a learnable decay cannot start from decay {show(self.decay)}"
            fix = "write learnable_decay: false, or start from paper, experiment, or gammas between 0 and 1"
            yield Fault((OURS + "learnable_decay",), what, fix)
        if self.conv_width is not None and not 2 <= self.conv_width <= 8:
            fix = f"write {min(max(self.conv_width, 2), 8)}"
            yield Fault((OURS + "conv_width",), f"expected 2 to 8 tokens, got {self.conv_width}", fix)
        if self.conv_width is not None and self.qkv_activation != "none":
            what = f"qkv_activation {self.qkv_activation} with a convolution, which conv_activation follows"
            yield Fault((OURS + "qkv_activation",), what, f"remove it, or {OURS}conv_width")
        if self.gated_start != "none" and self.decay != "gated":
            what = f"gated_start is the start of a decay that depends on the token, not of decay {show(self.decay)}"
            yield Fault((OURS + "gated_start",), what, f"remove it, or write {OURS}decay: gated")
        if self.decay_norm and self.decay == "gated":
            what = "decay_norm is defined for a decay that is fixed per head, not for decay: gated"
            yield Fault((OURS + "decay_norm",), what, "write false, or another decay")

    def _widths(self, model: Model) -> Iterator[Fault]:
        heads = model.n_heads
        for key, width in (("key_dim", self.key_dim), ("value_dim", self.value_dim)):
            if width is not None and width % heads:
                fix = f"write a multiple of {heads}, such as {max(1, round(width / heads)) * heads}"
                yield Fault((OURS + key,), f"{width} cannot be split into {heads} heads (n_heads)", fix)
        key_dim = None if self.key_dim is None else self.key_dim // heads
        yield from partial_rotation_faults(self.rotary_dim, model.head_dim if key_dim is None else key_dim, self.rope)
        if self.rope and self.rotary_dim is None and self.key_dim is not None and self.key_dim % (2 * heads) == heads:
            what = f"rotary positions rotate pairs, but the keys of a head are {self.key_dim // heads} wide"
            yield Fault((OURS + "key_dim",), what, f"write a multiple of {2 * heads}, or rope: false")

    @property
    def rotates_heads(self) -> bool:
        return self.rope and self.key_dim is None and self.rotary_dim is None

    def reach(self, config: ModelConfig) -> tuple[float, ...] | None:
        """The distance at which the decay of each head falls below 1%."""
        from retnet.models.cost import head_windows

        return tuple(head_windows(config)[0]) or None

    def estimate(self, model: Model) -> int:
        return 4 * model.d_model * model.d_model + model.d_model
