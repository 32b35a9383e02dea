"""EulerStack's estimate of a stack's parameters, reproduced for comparison with the count of the built model.

It ignores biases, the gate and the wider values of retention, and assumes a tied head unless `head.tie_weights` is
false.
"""

from .layers import Layer
from .schema import Model, Spec


def estimate_parameters(spec: Spec, layers: tuple[Layer, ...]) -> int:
    """Parameters as EulerStack's `validate --report` prints them."""
    model = spec.model
    embeddings = model.vocab_size * model.d_model * (1 if spec.head.tie_weights else 2)
    return embeddings + model.d_model + sum(_layer(inner, model) for layer in layers for inner in layer.inner)


def _layer(layer: Layer, model: Model) -> int:
    return layer.mixer.estimate(model) + _ffn(layer, model) + 2 * model.d_model


def _ffn(layer: Layer, model: Model) -> int:
    matrix = model.d_model * model.d_model * model.mlp_ratio
    assert layer.ffn is not None
    match layer.ffn.type:
        case "mlp":
            return 2 * matrix
        case "gated_mlp":
            return 3 * matrix
        case _:
            experts = layer.ffn.moe.experts if layer.ffn.moe else 0
            return experts * 3 * matrix + model.d_model * experts
