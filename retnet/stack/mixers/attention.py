"""`type: attention`: softmax attention, global or in a window, to keys or to latents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from retnet.plots.palette import COLOURS

from .. import unsupported
from ..errors import Category, Fault
from ..scalars import ONE_OF, Count, Flag, MaybePositiveInt, PositiveInt, PositiveIntOrNull, Probability
from ..section import OURS, Section
from .settings import MixerSettings, partial_rotation_faults

if TYPE_CHECKING:
    from retnet.layers.softmax_attention import SoftmaxConfig
    from retnet.models.config import ModelConfig

    from ..schema import Embedding, Model, Spec


class AttentionSinks(Section):
    """Logits per head that take a share of the attention weights and have no value; they start at 0."""

    n_per_head: Count = 1
    learnable: Flag = True


class Attention(MixerSettings):
    """Latents (`latent_dim`) have no positions unless `rope` or `mla.rope_dim` is given."""

    STATE_KEY = "kv_cache"
    GUIDE = "attention"
    COLOUR: ClassVar[str] = COLOURS["attention"]
    UNSUPPORTED = unsupported.ATTENTION
    UNSUPPORTED_VALUES = unsupported.ATTENTION_VALUES
    ALSO_CALLED: ClassVar[Mapping[str, str]] = {
        "output_gate": "gate",
        "partial_rotary_factor": "rotary_dim",
        **dict.fromkeys(("mla", "rope_dim", "qk_rope_head_dim"), "mla.rope_dim"),
        **dict.fromkeys(("q_rank", "q_lora_rank"), "mla.q_rank"),
    }

    qkv_bias: Flag = False
    attn_drop: Probability = 0.0
    window: PositiveIntOrNull = None
    window_mode: Annotated[Literal["standard", "sliding"], ONE_OF] = "standard"
    window_dilation: PositiveInt = 1
    attention_sinks: AttentionSinks = AttentionSinks(n_per_head=0)
    latent_dim: PositiveIntOrNull = None
    rope: Flag = Field(default=True, alias=OURS + "rope")  # false: no positions in this layer (NoPE)
    rotary_dim: MaybePositiveInt = Field(default=None, alias=OURS + "rotary_dim")
    qk_norm: Annotated[Literal["rms", "l2", "none"], ONE_OF] = Field(default="none", alias=OURS + "qk_norm")
    gate: Annotated[Literal["sigmoid", "none"], ONE_OF] = Field(default="none", alias=OURS + "gate")
    mla_rope_dim: MaybePositiveInt = Field(default=None, alias=OURS + "mla.rope_dim")
    mla_q_rank: MaybePositiveInt = Field(default=None, alias=OURS + "mla.q_rank")
    mla_norm: Annotated[Literal["rms", "none"], ONE_OF] = Field(default="none", alias=OURS + "mla.norm")

    def config(self, spec: Spec) -> SoftmaxConfig:
        """Rotary positions pair the halves of what rotates."""
        from retnet.layers.attention import AttentionConfig
        from retnet.layers.latent_attention import LatentAttentionConfig

        options: dict[str, Any] = {
            "num_heads": spec.model.n_heads,
            "num_kv_heads": spec.model.kv_heads,
            "head_dim": spec.model.head_dim,
            "rotary": "half" if self._rotates(spec.embedding) else "none",
            "rotary_dim": self.rotary_dim,
            "qk_norm": self.qk_norm,
            "gate": self.gate,
            "alibi": spec.embedding.positional == "alibi",
            "window": self.window,
            "qkv_bias": self.qkv_bias,
            "dropout": self.attn_drop,
            "num_sinks": self.attention_sinks.n_per_head,
            "learnable_sinks": self.attention_sinks.learnable,
            **spec.rotary(),
        }
        if self.latent_dim is None:
            return AttentionConfig(**options)
        return LatentAttentionConfig(
            **options,
            latent_dim=self.latent_dim,
            rope_dim=self.mla_rope_dim,
            q_rank=self.mla_q_rank,
            latent_norm=self.mla_norm,
        )

    def _rotates(self, embedding: Embedding | None) -> bool:
        """Whether something in the layer rotates; in one with latents only what is asked for. None: not known."""
        asked = self.rope
        if self.latent_dim is not None and "rope" not in self.model_fields_set:
            asked = self.mla_rope_dim is not None
        return asked and (embedding is None or embedding.positional == "rope")

    def words(self, name: str) -> str:
        latent = self.latent_dim is not None
        rotates, beside = self._rotates(None), self.mla_rope_dim is not None
        absorbed = self.qk_norm == "none" and (beside or not rotates)
        parts = {
            f"latents of {self.latent_dim}, {'absorbed' if absorbed else 'keys rebuilt'}": latent,
            f"queries of rank {self.mla_q_rank}": self.mla_q_rank is not None,
            f"window {self.window}": self.window is not None,
            "no rotation": not rotates,
            f"rotation of {self.mla_rope_dim} beside": beside,
            f"rotation of {self.rotary_dim}": self.rotary_dim is not None,
            _sinks(self.attention_sinks): self.attention_sinks.n_per_head > 0,
            f"{self.qk_norm} norm of q and k": self.qk_norm != "none",
            f"{self.mla_norm} norm of latents": self.mla_norm != "none",
            f"{self.gate} gate": self.gate != "none",
        }
        return ", ".join([name, *(part for part, given in parts.items() if given)])

    def faults(self, model: Model | None, embedding: Embedding | None) -> Iterator[Fault]:
        if self.window_dilation > 1:
            what = f"`window_dilation: {self.window_dilation}` (dilated windows) is not supported here"
            yield Fault(("window_dilation",), what, "remove it", Category.UNSUPPORTED)
        if self.mla_rope_dim is None:
            head_dim, rotates = None if model is None else model.head_dim, self._rotates(embedding)
            yield from partial_rotation_faults(self.rotary_dim, head_dim, rotates)
        if self.latent_dim is None:
            given = {"rope_dim": self.mla_rope_dim, "q_rank": self.mla_q_rank, "norm": self.mla_norm}
            for key in (key for key, value in given.items() if value not in (None, "none")):
                yield Fault((OURS + "mla." + key,), f"mla.{key} needs latent_dim", "remove it, or add latent_dim")
            return
        if model is not None and self.latent_dim >= model.d_model:
            what = f"latent_dim {self.latent_dim} is not below d_model {model.d_model}, so it saves nothing"
            yield Fault(("latent_dim",), what, f"write a smaller number, such as {max(1, model.d_model // 4)}")
        if self.mla_rope_dim is not None:
            yield from self._decoupled_rotation_faults(self.mla_rope_dim, embedding)

    def _decoupled_rotation_faults(self, rope_dim: int, embedding: Embedding | None) -> Iterator[Fault]:
        path = (OURS + "mla.rope_dim",)
        if rope_dim % 2:
            yield Fault(path, f"rotary positions rotate pairs, but mla.rope_dim is {rope_dim}", f"write {rope_dim + 1}")
        if not self._rotates(embedding):
            fix = "remove it, or write embedding.positional: rope and no rope: false"
            yield Fault(path, f"mla.rope_dim {rope_dim} in a layer without rotary positions", fix)
        if self.rotary_dim is not None:
            what = f"rotary_dim {self.rotary_dim} with mla.rope_dim, whose components alone rotate"
            yield Fault((OURS + "rotary_dim",), what, "remove one of the two")

    @property
    def rotates_heads(self) -> bool:
        return self._rotates(None) and self.rotary_dim is None and self.mla_rope_dim is None

    @property
    def reaches_all(self) -> bool:
        return self.window is None

    def reach(self, config: ModelConfig) -> tuple[float, ...] | None:
        return None if self.window is None else (float(self.window),)

    def estimate(self, model: Model) -> int:
        return 2 * model.d_model * model.d_model + 2 * model.d_model * model.kv_heads * model.head_dim


def _sinks(sinks: AttentionSinks) -> str:
    many = sinks.n_per_head != 1
    kind = "" if sinks.learnable else "fixed "
    return f"{sinks.n_per_head} {kind}sinks per head" if many else f"{kind or 'a '}sink per head"
