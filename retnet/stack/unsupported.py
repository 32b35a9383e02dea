"""Keys and values of schema_version 1 that this library does not support: refused by name, never ignored.

They are listed per section. A null key has no effect and is accepted where the schema allows null (`takes_null`).
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Unsupported:
    """A refused key or value: what it means, and what to write instead."""

    what: str
    instead: str = "remove it"
    takes_null: bool = False


@dataclass(frozen=True)
class UnsupportedValue(Unsupported):
    """A refused value. companions: keys that only it has, and that are not reported separately."""

    companions: tuple[str, ...] = ()


Keys = dict[str, Unsupported]
Values = dict[str, dict[str, UnsupportedValue]]

TOP: Keys = {
    "transition": Unsupported("transitions between reasoning phases", "remove it", takes_null=True),
}
TEMPLATE: Keys = {
    "memory": Unsupported(
        "a memory module in addition to the mixer",
        "remove it; a retnet or mamba mixer carries a state",
        takes_null=True,
    ),
    "shape_change": Unsupported(
        "a width that changes between layers", "remove it; all layers have width model.d_model", takes_null=True
    ),
}
MIXER_VALUES: Values = {
    "type": {
        "ttt_layer": UnsupportedValue(
            "test-time training layers",
            "use retnet or mamba, whose state is also updated at every token",
            companions=("ttt",),
        ),
    }
}
# The key of `state` that an unsupported mixer may set; None: neither.
STATE_KEYS: dict[str, Literal["kv_cache", "ssm_state"] | None] = {"ttt_layer": "ssm_state"}
_WINDOW = "write window_mode: sliding with a window, or global attention without one"
ATTENTION: Keys = {
    "compression": Unsupported("compressed sparse attention", f"remove it; {_WINDOW}"),
}
ATTENTION_VALUES: Values = {
    "window_mode": {
        "dilated": UnsupportedValue("dilated windows", _WINDOW, companions=("window_dilation",)),
        "nsa": UnsupportedValue("native sparse attention", _WINDOW, companions=("window_dilation",)),
    }
}
ROUTING_VALUES: Values = {
    "type": {
        "hash": UnsupportedValue("routing by a hash of the token", "write type: learned", companions=("hash_salt",))
    }
}
ENTRY: Keys = {
    "depth_gating": Unsupported("mixture of depths", "remove it; every layer processes every token", takes_null=True),
    "merge": Unsupported("a merge without streams", "remove it, or write parallel: for template:", takes_null=True),
}
PARALLEL_ENTRY: Keys = {
    "template": Unsupported("a template beside parallel streams", "write it as an entry of its own"),
    "repeat": Unsupported("repeated streams, of which EulerStack builds one copy", "write the entry several times"),
    "override": Unsupported("changes to a template beside parallel streams", "write a template with the changes"),
    "depth_gating": Unsupported("mixture of depths", "remove it; every layer processes every token", takes_null=True),
}
# Schedule entries of a kind that is refused as a whole.
ENTRY_KINDS: Keys = {
    "integrator": Unsupported("layers as steps of an integrator", "write `template` with `repeat`"),
}
COMPATIBILITY: Keys = {"quant_aware_training": Unsupported("quantisation-aware training", "remove it")}
