"""The small models of the engine's tests serve the fused step's, too."""

from tests.serve.conftest import any_model, hybrid, small

__all__ = ["any_model", "hybrid", "small"]
