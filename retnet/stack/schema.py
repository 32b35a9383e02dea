"""The sections of a stack file (EulerStack's schema_version 1) as typed models that refuse unknown keys.

Only the keys that act on the model or its training are fields; `unsupported` names the rest. The settings of mixers
are in `mixers`, rules between sections in `rules`. Defaults are the schema's; where it is silent, the paper's.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

from pydantic import Field, PlainValidator

from retnet.system.sizes import quantity

from . import unsupported
from .experts import Moe
from .hyper_connections import HyperConnections
from .mixers import AnyMixer
from .scalars import (
    LARGEST,
    ONE_OF,
    Coefficients,
    Flag,
    Fraction,
    Initialisation,
    MaybeNonNegative,
    MaybePositiveInt,
    MaybeProbability,
    ModuleCount,
    NonNegative,
    ParameterCount,
    Positive,
    PositiveInt,
    PositiveIntOrNull,
    PositiveOrNull,
    Probability,
    SchemaVersion,
    Seed,
    Steps,
    StepsOrNone,
    Text,
    TextOrNull,
)
from .section import OURS, Section

if TYPE_CHECKING:
    import torch

MaybeActivation = Annotated[Literal["swiglu", "gelu", "relu", None], ONE_OF]
Dtype = Annotated[Literal["float32", "float16", "bfloat16"], ONE_OF]
DEFAULT_ROPE_THETA = 10000.0
DEFAULT_ACTIVATION = {"mlp": "gelu", "gated_mlp": "swiglu", "moe": "gelu"}


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
    def torch_dtype(self) -> "torch.dtype":
        import torch  # not at the top: checking a file does not need it

        return getattr(torch, self.dtype)

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


class Ffn(Section):
    type: Annotated[Literal["mlp", "gated_mlp", "moe"], ONE_OF]
    activation: MaybeActivation = None
    bias: Flag = False
    moe: Moe | None = None


class Norm(Section):
    type: Annotated[Literal["rmsnorm", "layernorm"], ONE_OF] = "rmsnorm"
    position: Annotated[Literal["pre", "post"], ONE_OF] = "pre"


class Residual(Section):
    type: Annotated[Literal["sequential", "parallel", "hyper_connection"], ONE_OF] = "sequential"
    scaling: NonNegative = 1.0
    hyper: HyperConnections | None = None

    @property
    def suffix(self) -> str:
        """', parallel', ', 4 streams': after the norm in tables."""
        if self.hyper is not None:
            return f", {quantity(self.hyper.expand, 'stream')}"
        return "" if self.type == "sequential" else f", {self.type}"


class State(Section):
    kv_cache: Flag = False
    ssm_state: Flag = False


class Template(Section):
    UNSUPPORTED = unsupported.TEMPLATE

    mixer: AnyMixer
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
    """Changes to the template of one schedule entry. None keeps the template's value."""

    residual: ResidualOverride | None = None
    attention: AttentionOverride | None = None
    norm: NormOverride | None = None
    ffn: FfnOverride | None = None


class Entry(Section):
    UNSUPPORTED = unsupported.ENTRY

    template: Text
    repeat: PositiveInt = 1
    override: Override | None = None

    @property
    def num_layers(self) -> int:
        return self.repeat


class MultiToken(Section):
    """Multi-token prediction: n_predict modules of head_layers layers, each as the template has them."""

    head_template: Text
    n_predict: ModuleCount = 1
    head_layers: ModuleCount = 1
    train_loss_weight: NonNegative = 0.1


class BodyEntry(Section):
    """Layers of a stream."""

    template: Text
    repeat: PositiveInt = 1


class Stream(Section):
    stream: Text
    body: list[BodyEntry]


class Merge(Section):
    """How the outputs of parallel streams become one."""

    type: Annotated[Literal["concat", "add", "gated", "cross_attn"], ONE_OF] = "concat"
    projection: Flag = True
    source: TextOrNull = Field(default=None, alias="from")  # the stream of keys and values, and that of queries
    target: TextOrNull = Field(default=None, alias="to")


class ParallelEntry(Section):
    """A schedule entry of streams of layers that read the same input."""

    UNSUPPORTED = unsupported.PARALLEL_ENTRY

    parallel: list[Stream]
    merge: Merge | None = None

    @property
    def num_layers(self) -> int:
        """The layers of all streams."""
        return sum(entry.repeat for stream in self.parallel for entry in stream.body)


def entry_section(raw: Any) -> type[Entry] | type[ParallelEntry]:
    """The section that a schedule entry is."""
    return ParallelEntry if isinstance(raw, dict) and "parallel" in raw else Entry


AnyEntry = Annotated[Entry | ParallelEntry, PlainValidator(lambda value: entry_section(value).model_validate(value))]


class Head(Section):
    type: Annotated[Literal["causal_lm", "causal_lm_mtp"], ONE_OF]
    tie_weights: Flag = True
    logit_softcap: PositiveOrNull = None
    mtp: MultiToken | None = None


class MuonHints(Section):
    """The Newton-Schulz iteration: ns_iters steps with ns_coefs, then stabilize_iters steps with stabilize_coefs."""

    ns_iters: Steps = 8
    ns_coefs: Coefficients = Field(default=[3.4445, -4.775, 2.0315])
    stabilize_iters: StepsOrNone = 2
    stabilize_coefs: Coefficients = Field(default=[2.0, -1.5, 0.5])


class OptimizerGroups(Section):
    """Patterns of the names of parameters, for each algorithm."""

    muon: list[Text] = Field(default=[])
    adamw: list[Text] = Field(default=[])


class Mup(Section):
    """Ours: learning rates and initial weights relative to a base width (`retnet.models.mup`).

    base_head_dim: d_model / n_heads there, if it is not the same.
    """

    base_width: PositiveInt
    base_head_dim: MaybePositiveInt = None


class TrainingHints(Section):
    init: Initialisation = "normal_0.02"
    dropout: Probability = 0.0
    checkpointing: Flag = False
    seed: Seed = 1234
    router_aux_loss_coef: NonNegative = 0.01
    lr_peak: Positive = 3e-4
    lr_floor_ratio: Fraction = 0.1
    betas: Annotated[list[Probability], Field(min_length=2, max_length=2)] = Field(default=[0.9, 0.95])
    weight_decay: NonNegative = 0.1
    grad_clip: NonNegative = 1.0
    warmup_steps_ratio: Fraction = 0.03
    router_lr_multiplier: NonNegative = 1.0
    optimizer: Annotated[Literal["adamw", "muon", "hybrid"], ONE_OF] = "adamw"
    optimizer_groups: OptimizerGroups = OptimizerGroups()
    muon: MuonHints = MuonHints()
    mup: Mup | None = Field(default=None, alias=OURS + "mup")


class Compatibility(Section):
    UNSUPPORTED = unsupported.COMPATIBILITY

    compile_target: Annotated[Literal["huggingface"], ONE_OF] = "huggingface"
    dtype_policy: Annotated[Literal["uniform", "layered_safe"], ONE_OF] = "uniform"


class ExecutionMode(Section):
    """A phase of reasoning. Nothing here acts on the model, and the report says so."""

    name: Text
    max_tokens: PositiveInt
    kv_share: Flag = True
    loss_weight: NonNegative = 1.0
    visible_to_user: Flag = True
    per_token_rationale: Flag = False


class Spec(Section):
    """A whole stack file, with expressions replaced by their values."""

    UNSUPPORTED = unsupported.TOP

    schema_version: SchemaVersion
    model: Model
    tokenizer_contract: TokenizerContract
    embedding: Embedding
    layer_templates: Annotated[dict[str, Template], Field(min_length=1)]
    layer_schedule: Annotated[list[AnyEntry], Field(min_length=1)]
    head: Head
    training_hints: TrainingHints | None = None
    compatibility: Compatibility | None = None
    execution_modes: Annotated[list[ExecutionMode] | None, Field(min_length=1)] = None

    def rotary(self) -> "Rotary":
        """Rotary positions as the layers' configs take them. YaRN extends max_seq_len / factor to max_seq_len."""
        scaling = self.embedding.rope_scaling or RopeScaling()
        length = None
        if scaling.type == "yarn":
            length = max(1, round(min(self.model.max_seq_len / scaling.factor, LARGEST)))
        base = self.embedding.rope_theta or DEFAULT_ROPE_THETA
        return Rotary(rotary_base=base, rotary_factor=scaling.factor, rotary_yarn_length=length)


class Rotary(TypedDict):
    """The fields that AttentionConfig and RetentionConfig share."""

    rotary_base: float
    rotary_factor: float
    rotary_yarn_length: int | None
