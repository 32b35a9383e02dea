"""The mixers of a stack: one entry per mixer, read by everything in `retnet.stack` that depends on the mixer.

To add a mixer, write its entry, a subclass of `MixerSettings`, and list it in `MIXERS` under its name in YAML:

    class Toy(MixerSettings):
        STATE_KEY = "ssm_state"     # the key of `state` that says whether decoding carries the layer's state
        width: PositiveInt = 16     # a key of the file: its name, type, range and default

        def config(self, spec: Spec) -> ToyConfig:
            return ToyConfig(self.width, heads=spec.model.n_heads)

    MIXERS["toy"] = Toy

A file may then say `mixer: {type: toy, toy: {width: 32}}`. Keys that the schema does not have are declared with the
prefix `vendor.retnet.` (see `retnet.py`). `settings.py` lists what else an entry may define: rules, a description, a
colour, a reach. The layer itself is registered in `retnet.layers.mixers`. A mixer outside the package is added the same
way, before a file is read. A mixer of the package also has a section in docs/reference/stack.md; a test checks that.
"""

from .attention import Attention
from .branched import Branched
from .hyena import Hyena
from .mamba import Mamba
from .mixer import MIXERS, AnyMixer
from .retnet import Retnet
from .settings import MixerSettings

__all__ = ["MIXERS", "AnyMixer", "Attention", "Branched", "Hyena", "Mamba", "MixerSettings", "Retnet"]

MIXERS |= {"attention": Attention, "mamba": Mamba, "retnet": Retnet, "hyena": Hyena, "branched": Branched}
