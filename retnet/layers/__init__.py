"""Layers: nn.Modules, mixers of the form `(x, state, layout) -> (y, state)`."""
