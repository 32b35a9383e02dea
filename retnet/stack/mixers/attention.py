"""`type: attention`: softmax attention, global or in a window."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from retnet.plots.palette import COLOURS

from .. import unsupported
from ..errors import Category, Fault
from ..scalars import ONE_OF, Count, Flag, MaybePositiveInt, PositiveInt, PositiveIntOrNull, Probability
from ..section import OURS, Section
from .settings import MixerSettings, partial_rotation_faults

if TYPE_CHECKING:
    from retnet.layers.attention import AttentionConfig
    from retnet.models.config import ModelConfig

    from ..schema import Embedding, Model, Spec


class AttentionSinks(Section):
    """Logits per head that take a share of the attention weights and have no value; they start at 0."""

    n_per_head: Count = 1
    learnable: Flag = True


class Attention(MixerSettings):
    STATE_KEY = "kv_cache"
    GUIDE = "attention"
    COLOUR: ClassVar[str] = COLOURS["attention"]
    UNSUPPORTED = unsupported.ATTENTION
    UNSUPPORTED_VALUES = unsupported.ATTENTION_VALUES

    qkv_bias: Flag = False
    attn_drop: Probability = 0.0
    window: PositiveIntOrNull = None
    window_mode: Annotated[Literal["standard", "sliding"], ONE_OF] = "standard"
    window_dilation: PositiveInt = 1
    attention_sinks: AttentionSinks = AttentionSinks(n_per_head=0)
    rope: Flag = Field(default=True, alias=OURS + "rope")  # false: no positions in this layer (NoPE)
    rotary_dim: MaybePositiveInt = Field(default=None, alias=OURS + "rotary_dim")
    qk_norm: Annotated[Literal["rms", "l2", "none"], ONE_OF] = Field(default="none", alias=OURS + "qk_norm")
    gate: Annotated[Literal["sigmoid", "none"], ONE_OF] = Field(default="none", alias=OURS + "gate")

    def config(self, spec: Spec) -> AttentionConfig:
        """Rotary positions pair the halves of a head."""
        from retnet.layers.attention import AttentionConfig

        return AttentionConfig(
            num_heads=spec.model.n_heads,
            num_kv_heads=spec.model.kv_heads,
            head_dim=spec.model.head_dim,
            rotary="half" if spec.embedding.positional == "rope" and self.rope else "none",
            rotary_dim=self.rotary_dim,
            qk_norm=self.qk_norm,
            gate=self.gate,
            alibi=spec.embedding.positional == "alibi",
            window=self.window,
            qkv_bias=self.qkv_bias,
            dropout=self.attn_drop,
            num_sinks=self.attention_sinks.n_per_head,
            learnable_sinks=self.attention_sinks.learnable,
            **spec.rotary(),
        )

    def words(self, name: str) -> str:
        parts = {
            f"window {self.window}": self.window is not None,
            "no rotation": not self.rope,
            f"rotation of {self.rotary_dim}": self.rotary_dim is not None,
            _sinks(self.attention_sinks): self.attention_sinks.n_per_head > 0,
            f"{self.qk_norm} norm of q and k": self.qk_norm != "none",
            f"{self.gate} gate": self.gate != "none",
        }
        return ", ".join([name, *(part for part, given in parts.items() if given)])

    def faults(self, model: Model | None, embedding: Embedding | None) -> Iterator[Fault]:
        if self.window_dilation > 1:
            what = f"`window_dilation: {self.window_dilation}` (dilated windows) is not supported here"
            yield Fault(("window_dilation",), what, "remove it", Category.UNSUPPORTED)
        rotates = self.rope and (embedding is None or embedding.positional == "rope")
        yield from partial_rotation_faults(self.rotary_dim, None if model is None else model.head_dim, rotates)

    @property
    def rotates_heads(self) -> bool:
        return self.rope and self.rotary_dim is None

    def reach(self, config: ModelConfig) -> tuple[float, ...] | None:
        return None if self.window is None else (float(self.window),)

    def estimate(self, model: Model) -> int:
        return 2 * model.d_model * model.d_model + 2 * model.d_model * model.kv_heads * model.head_dim


def _sinks(sinks: AttentionSinks) -> str:
    many = sinks.n_per_head != 1
    kind = "" if sinks.learnable else "fixed "
    return f"{sinks.n_per_head} {kind}sinks per head" if many else f"{kind or 'a '}sink per head"
