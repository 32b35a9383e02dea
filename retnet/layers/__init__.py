"""Layers: nn.Modules, mixers of the form `(x, state, layout) -> (y, state)`.

The mixers of the package are registered as soon as any layer is imported: blocks look them up by name, and some mixers
are made of blocks.
"""

from retnet.layers import mixers as mixers
