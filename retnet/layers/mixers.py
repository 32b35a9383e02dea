"""The mixers of the package, one line each; read by everything that depends on which mixers there are.

To add a mixer, write its file beside this one (configuration, state, draft, module, operations; bases in
`mixer_base.py`) and its line here, and its entry in `retnet.stack.mixers` for stack files. A mixer outside the package
is added by `register`, before a configuration names it.
"""

from retnet.layers.attention import Attention, AttentionConfig, AttentionDraft, AttentionState, attention_flops
from retnet.layers.branched import Branched, BranchedConfig, BranchedDraft, BranchedState, branched_flops
from retnet.layers.hyena import Hyena, HyenaConfig, HyenaState, hyena_flops
from retnet.layers.hyper_connection import HyperConnection
from retnet.layers.latent_attention import (
    LatentAttention,
    LatentAttentionConfig,
    LatentDraft,
    LatentState,
    latent_attention_flops,
)
from retnet.layers.mamba1 import Mamba1, Mamba1Config, Mamba1Draft, Mamba1State, mamba1_flops
from retnet.layers.mamba2 import Mamba2, Mamba2Config, Mamba2State, mamba2_flops
from retnet.layers.moe import MoE
from retnet.layers.registry import MIXERS, Mixer, kind_of, mixer_configs, mixer_of, register
from retnet.layers.retention import (
    MultiScaleRetention,
    RetentionConfig,
    RetentionDraft,
    RetentionState,
    retention_flops,
)
from retnet.layers.streams import Streams, StreamsConfig, StreamsDraft, StreamsState, streams_flops

__all__ = ["MIXERS", "Mixer", "float32_parameters", "kind_of", "mixer_configs", "mixer_of", "register"]


def float32_parameters() -> set[str]:
    """Names of the parameters and buffers that stay float32 in a model of half precision, over all layers."""
    mixers = {name for mixer in MIXERS.values() for name in mixer.module.FLOAT32_PARAMETERS}
    return mixers | {*MoE.FLOAT32_PARAMETERS, *HyperConnection.FLOAT32_PARAMETERS}


register(Mixer("retention", RetentionConfig, MultiScaleRetention, RetentionState, RetentionDraft, retention_flops))
register(Mixer("attention", AttentionConfig, Attention, AttentionState, AttentionDraft, attention_flops))
register(
    Mixer("latent_attention", LatentAttentionConfig, LatentAttention, LatentState, LatentDraft, latent_attention_flops)
)
register(Mixer("mamba1", Mamba1Config, Mamba1, Mamba1State, Mamba1Draft, mamba1_flops))
register(Mixer("mamba2", Mamba2Config, Mamba2, Mamba2State, RetentionDraft, mamba2_flops))
register(Mixer("hyena", HyenaConfig, Hyena, HyenaState, None, hyena_flops))
register(Mixer("branched", BranchedConfig, Branched, BranchedState, BranchedDraft, branched_flops))
register(Mixer("streams", StreamsConfig, Streams, StreamsState, StreamsDraft, streams_flops))
