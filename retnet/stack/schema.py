"""The sections of a stack file (EulerStack's schema_version 1) as closed, typed models.

Only the keys that act on the model or its training are fields; `unsupported` names the rest. What keys of
different sections demand of each other is in `rules`. Defaults are the schema's; where it is silent, the paper's.
Fields whose key starts with `vendor.retnet.` are ours: the schema leaves that prefix to whoever reads the file.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from . import unsupported
from .scalars import (
    ONE_OF,
    Decay,
    Flag,
    Fraction,
    Initialisation,
    MaybeNonNegative,
    MaybePositive,
    MaybePositiveInt,
    MaybeProbability,
    NonNegative,
    ParameterCount,
    Positive,
    PositiveInt,
    PositiveIntOrNull,
    PositiveOrNull,
    Probability,
    SchemaVersion,
    Seed,
    Text,
    TextOrNull,
)

OURS = "vendor.retnet."
RESERVED_PREFIXES = ("experimental.", "future.", "vendor.")

# None: the key is absent.
MaybeActivation = Annotated[Literal["swiglu", "gelu", "relu", None], ONE_OF]
Dtype = Annotated[Literal["float32", "float16", "bfloat16"], ONE_OF]
MIXERS = ("attention", "mamba", "retnet", "hyena")
# The state key that each mixer may set; hyena has none.
# What each mixer may hold of STATES; those that are not run are in the schema as well.
STATE_OF = {
    "attention": "kv_cache",
    "retnet": "kv_cache",
    "mamba": "ssm_state",
    "hyena": None,
    "branched": None,
    "ttt_layer": "ssm_state",
}
# tokenizer_contract.pretrained of the byte tokenizer (`retnet.data.tokenizer`), and its tokens.
BYTES, BYTE_TOKENS, DOCUMENT_START = "bytes", 257, 256
DEFAULT_ROPE_THETA = 10000.0
DEFAULT_ACTIVATION = {"mlp": "gelu", "gated_mlp": "swiglu", "moe": "gelu"}


class Section(BaseModel):
    """A mapping of the file. Closed: a key is a field, one of `UNSUPPORTED`, reserved, or an error."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, populate_by_name=True)

    UNSUPPORTED: ClassVar[unsupported.Keys] = {}
    UNSUPPORTED_VALUES: ClassVar[unsupported.Values] = {}

    @classmethod
    def keys(cls) -> dict[str, Any]:
        """The keys as the file spells them, with the type of each."""
        return {info.alias or name: info.annotation for name, info in cls.model_fields.items()}


class Model(Section):
    name: TextOrNull
    family_hint: TextOrNull = None
    d_model: PositiveInt
    vocab_size: PositiveInt
    max_seq_len: PositiveInt
    n_heads: PositiveInt
    n_kv_heads: MaybePositiveInt = None
    mlp_ratio: PositiveInt = 4
    dtype: Dtype = "bfloat16"
    target_params: ParameterCount = None

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads


class TokenizerContract(Section):
    type: Annotated[Literal["hf"], ONE_OF]
    pretrained: Text
    add_bos: Flag = True
    add_eos: Flag = True
    pad_token: TextOrNull = None


class RopeScaling(Section):
    type: Annotated[Literal["linear", "yarn"], ONE_OF] = "linear"
    factor: Positive = 1.0


class Embedding(Section):
    type: Annotated[Literal["learned"], ONE_OF]
    positional: Annotated[Literal["rope", "none", "alibi"], ONE_OF]
    rope_theta: PositiveOrNull = None
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: Flag = True
    scale: PositiveOrNull = None


class Attention(Section):
    UNSUPPORTED = unsupported.ATTENTION
    UNSUPPORTED_VALUES = unsupported.ATTENTION_VALUES

    qkv_bias: Flag = False
    attn_drop: Probability = 0.0
    window: PositiveIntOrNull = None
    window_mode: Annotated[Literal["standard", "sliding"], ONE_OF] = "standard"
    window_dilation: PositiveInt = 1


class Mamba(Section):
    variant: Annotated[Literal["mamba1", "mamba2"], ONE_OF] = "mamba2"
    d_state: PositiveInt = 64
    d_conv: PositiveInt = 4
    expand: PositiveInt = 2
    head_dim: MaybePositiveInt = Field(default=None, alias=OURS + "head_dim")


class Retnet(Section):
    chunkwise: Flag = True
    chunk_size: PositiveInt = 64
    rope: Flag = True
    # The schema is silent on all that follows; the defaults are the paper's (layers.retention says what each does).
    key_dim: MaybePositiveInt = Field(default=None, alias=OURS + "key_dim")  # over all heads; default d_model
    value_dim: MaybePositiveInt = Field(default=None, alias=OURS + "value_dim")  # over all heads; default 2 d_model
    decay: Decay = Field(default="paper", alias=OURS + "decay")
    learnable_decay: Flag = Field(default=False, alias=OURS + "learnable_decay")
    decay_norm: Flag = Field(default=False, alias=OURS + "decay_norm")
    rotary: Annotated[Literal["interleaved", "half"], ONE_OF] = Field(default="interleaved", alias=OURS + "rotary")
    gate: Annotated[Literal["swish", "none"], ONE_OF] = Field(default="swish", alias=OURS + "gate")
    head_norm: Annotated[Literal["layer", "rms", "none"], ONE_OF] = Field(default="layer", alias=OURS + "head_norm")
    head_norm_affine: Annotated[Literal["none", "shared", "per_head"], ONE_OF] = Field(
        default="none", alias=OURS + "head_norm_affine"
    )
    head_norm_eps: Positive = Field(default=1e-6, alias=OURS + "head_norm_eps")


class Hyena(Section):
    depth: PositiveInt = 2
    filter_hidden: PositiveInt = 64
    filter_decay: NonNegative = 0.0


class Mixer(Section):
    UNSUPPORTED_VALUES = unsupported.MIXER_VALUES

    type: Annotated[Literal["attention", "mamba", "retnet", "hyena"], ONE_OF]
    attention: Attention | None = None
    mamba: Mamba | None = None
    retnet: Retnet | None = None
    hyena: Hyena | None = None


class Moe(Section):
    UNSUPPORTED = unsupported.MOE

    experts: PositiveInt
    top_k: PositiveInt
    router: Annotated[Literal["softmax", "sigmoid"], ONE_OF] = "softmax"
    z_loss: NonNegative = 0.0
    capacity_factor: Positive = 1.0
    load_balance_coef: MaybeNonNegative = None
    router_init_std: MaybePositive = None
    router_jitter: Probability = 0.0
    capacity_drop_policy: Annotated[Literal["overflow", "drop", "pad"], ONE_OF] = "overflow"


class Ffn(Section):
    type: Annotated[Literal["mlp", "gated_mlp", "moe"], ONE_OF]
    activation: MaybeActivation = None
    bias: Flag = False
    moe: Moe | None = None


class Norm(Section):
    type: Annotated[Literal["rmsnorm", "layernorm"], ONE_OF] = "rmsnorm"
    position: Annotated[Literal["pre", "post"], ONE_OF] = "pre"


class Residual(Section):
    UNSUPPORTED = unsupported.RESIDUAL
    UNSUPPORTED_VALUES = unsupported.RESIDUAL_VALUES

    type: Annotated[Literal["sequential", "parallel"], ONE_OF] = "sequential"
    scaling: NonNegative = 1.0


class State(Section):
    kv_cache: Flag = False
    ssm_state: Flag = False


class Template(Section):
    UNSUPPORTED = unsupported.TEMPLATE

    mixer: Mixer
    ffn: Ffn
    norm: Norm | None = None
    residual: Residual | None = None
    state: State | None = None


class AttentionOverride(Section):
    window: PositiveIntOrNull = None
    attn_drop: MaybeProbability = None


class NormOverride(Section):
    type: Annotated[Literal["rmsnorm", "layernorm", None], ONE_OF] = None
    position: Annotated[Literal["pre", "post", None], ONE_OF] = None


class ResidualOverride(Section):
    scaling: MaybeNonNegative = None


class FfnOverride(Section):
    activation: MaybeActivation = None


class Override(Section):
    """What one schedule entry changes of its template; None leaves the template's value."""

    residual: ResidualOverride | None = None
    attention: AttentionOverride | None = None
    norm: NormOverride | None = None
    ffn: FfnOverride | None = None


class Entry(Section):
    UNSUPPORTED = unsupported.ENTRY

    template: Text
    repeat: PositiveInt = 1
    override: Override | None = None


class Head(Section):
    UNSUPPORTED = unsupported.HEAD
    UNSUPPORTED_VALUES = unsupported.HEAD_VALUES

    type: Annotated[Literal["causal_lm"], ONE_OF]
    tie_weights: Flag = True
    logit_softcap: PositiveOrNull = None


class TrainingHints(Section):
    UNSUPPORTED = unsupported.TRAINING_HINTS

    init: Initialisation = "normal_0.02"
    dropout: Probability = 0.0
    checkpointing: Flag = False
    seed: Seed = 1234
    router_aux_loss_coef: NonNegative = 0.01
    lr_peak: Positive = 3e-4
    lr_floor_ratio: Fraction = 0.1
    betas: Annotated[list[Probability], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    weight_decay: NonNegative = 0.1
    grad_clip: NonNegative = 1.0
    warmup_steps_ratio: Fraction = 0.03
    router_lr_multiplier: NonNegative = 1.0
    optimizer: Annotated[Literal["adamw", "muon", "hybrid"], ONE_OF] = "adamw"


class Compatibility(Section):
    UNSUPPORTED = unsupported.COMPATIBILITY

    compile_target: Annotated[Literal["huggingface"], ONE_OF] = "huggingface"
    dtype_policy: Annotated[Literal["uniform", "layered_safe"], ONE_OF] = "uniform"


class Spec(Section):
    """A whole stack file, `let` and its expressions already replaced by their values."""

    UNSUPPORTED = unsupported.TOP

    schema_version: SchemaVersion
    model: Model
    tokenizer_contract: TokenizerContract
    embedding: Embedding
    layer_templates: Annotated[dict[str, Template], Field(min_length=1)]
    layer_schedule: Annotated[list[Entry], Field(min_length=1)]
    head: Head
    training_hints: TrainingHints | None = None
    compatibility: Compatibility | None = None
