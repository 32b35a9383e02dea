"""Growth of linear maps with the model's width, which decides their rules under muP (`retnet.models.mup`).

    kind       input grows   output grows
    hidden     yes           yes            projections of mixers and feed-forwards, experts
    readout    yes           no             decays, routers, gates of branches and streams, B and C of Mamba
    input      no            yes            embeddings, the last layer of Hyena's filters
    fixed      no            no             the other layers of Hyena's filters

A module names the kinds of its maps in a class attribute `GROWTH`: name of a submodule, or of a weight of its own ->
kind, or one kind per part of a product of several (`weight_parts`). Maps that it names in `WEIGHT_ROLES` alone are
hidden. All other parameters (norms, biases, convolutions, rates per head or channel) act on each channel alone, so that
no sum grows with the width.
"""

from collections.abc import Mapping
from typing import Literal

Growth = Literal["hidden", "readout", "input", "fixed"]
Growths = Mapping[str, Growth | tuple[Growth, ...]]
