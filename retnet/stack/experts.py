"""The `moe` section of a stack file: a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from . import unsupported
from .errors import Fault
from .scalars import (
    ONE_OF,
    Count,
    Flag,
    MaybeNonNegative,
    MaybePositive,
    MaybePositiveInt,
    NonNegative,
    Positive,
    PositiveInt,
    PositiveIntOrNull,
    Probability,
)
from .section import OURS, Section

if TYPE_CHECKING:
    from retnet.layers.moe import MoEConfig

USUAL_GROUPS = 8  # of DeepSeek-V3


class BiasCorrection(Section):
    """A bias for the choice of experts, which training moves against the load."""

    enabled: Flag = False
    update_rate: NonNegative = 1e-3
    target_imbalance: NonNegative = 0.0


class Routing(Section):
    UNSUPPORTED_VALUES = unsupported.ROUTING_VALUES

    type: Annotated[Literal["learned"], ONE_OF]


class Balance(Section):
    """sequence_aux_coef: of the balance loss per document. group_limit: the groups of experts that a token may use."""

    sequence_aux_coef: NonNegative = 0.0
    group_limit: PositiveIntOrNull = None


class Moe(Section):
    """Keys with the prefix `vendor.retnet.` are ours; `MoEConfig` explains them."""

    ALSO_CALLED: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("routed_scaling_factor", "scale"), "routed_scale"),
        **dict.fromkeys(("n_group", "num_groups"), "groups"),
        "norm_topk_prob": "normalize_weights",
    }

    experts: PositiveInt
    top_k: PositiveInt
    router: Annotated[Literal["softmax", "sigmoid"], ONE_OF] = "softmax"
    affinity: Annotated[Literal["softmax", "sigmoid", "sqrt_softplus", None], ONE_OF] = None
    shared_experts: Count = 0
    bias_correction: BiasCorrection = BiasCorrection()
    routing: Routing = Routing(type="learned")
    balance: Balance = Balance()
    z_loss: NonNegative = 0.0
    capacity_factor: Positive = 1.0
    load_balance_coef: MaybeNonNegative = None
    router_init_std: MaybePositive = None
    router_jitter: Probability = 0.0
    capacity_drop_policy: Annotated[Literal["overflow", "drop", "pad"], ONE_OF] = "overflow"
    routed_scale: Positive = Field(default=1.0, alias=OURS + "routed_scale")
    normalize_weights: Flag = Field(default=True, alias=OURS + "normalize_weights")
    groups: MaybePositiveInt = Field(default=None, alias=OURS + "groups")

    @property
    def score(self) -> Literal["softmax", "sigmoid", "sqrt_softplus"]:
        """The function of the router's logits: `affinity`, otherwise `router`."""
        return self.affinity or self.router

    @property
    def num_groups(self) -> int:
        """Groups of experts; without `vendor.retnet.groups` the most, up to 8, that leave a token top_k experts."""
        limit = self.balance.group_limit
        if limit is None:
            return 1
        if self.groups is not None:
            return self.groups
        possible = (n for n in range(USUAL_GROUPS, 0, -1) if self.experts % n == 0)
        return next((n for n in possible if min(limit, n) * (self.experts // n) >= self.top_k), 1)

    @property
    def top_groups(self) -> int:
        return min(self.balance.group_limit or 1, self.num_groups)

    def faults(self) -> Iterator[Fault]:
        """Values that contradict each other, with paths that start at this section."""
        if self.groups is None:
            return
        here, limit = (OURS + "groups",), self.balance.group_limit
        if limit is None:
            what = "groups have no meaning without balance.group_limit"
            yield Fault(here, what, "add balance: {group_limit: N}, the groups that a token may use, or remove it")
        elif self.experts % self.groups:
            yield Fault(here, f"{self.experts} experts cannot be divided into {self.groups} groups", "write a divisor")
        elif self.top_k <= self.experts and self.top_groups * (self.experts // self.groups) < self.top_k:
            held = self.top_groups * (self.experts // self.groups)
            what = f"group_limit {limit} of {self.groups} groups leaves a token {held} experts, fewer than top_k"
            yield Fault(here, what, "write fewer groups, or raise balance.group_limit")

    def config(self, *, hidden_dim: int, balance_coef: float, **options: Any) -> MoEConfig:
        """The configuration of the layer. options: gated, activation and bias of the experts.

        balance_coef: of the balance loss of layers that give none.
        """
        from retnet.layers.moe import MoEConfig

        correction = self.bias_correction
        return MoEConfig(
            num_experts=self.experts,
            top_k=self.top_k,
            hidden_dim=hidden_dim,
            router=self.score,
            normalize_weights=self.normalize_weights,
            routed_scale=self.routed_scale,
            shared_hidden_dim=self.shared_experts * hidden_dim or None,
            num_groups=self.num_groups,
            top_groups=self.top_groups,
            bias_update_rate=correction.update_rate if correction.enabled else None,
            bias_tolerance=correction.target_imbalance,
            capacity_factor=self.capacity_factor,
            capacity_policy=self.capacity_drop_policy,
            load_balance_coef=balance_coef if self.load_balance_coef is None else self.load_balance_coef,
            sequence_balance_coef=self.balance.sequence_aux_coef,
            z_loss_coef=self.z_loss,
            router_jitter=self.router_jitter,
            router_init_std=self.router_init_std,
            **options,
        )

    def words(self) -> str:
        """'2 of 8 experts', '4 of 16 experts (sigmoid, biased, 4 of 8 groups) + 1 shared'."""
        traits = {
            self.score.replace("_", " "): self.score != "softmax",
            "biased": self.bias_correction.enabled,
            f"{self.top_groups} of {self.num_groups} groups": self.top_groups < self.num_groups,
            f"x {self.routed_scale:g}": self.routed_scale != 1.0,
        }
        given = ", ".join(trait for trait, is_given in traits.items() if is_given)
        shared = f" + {self.shared_experts} shared" if self.shared_experts else ""
        return f"{self.top_k} of {self.experts} experts" + (f" ({given})" if given else "") + shared
