"""Powers of two that keep a float16 state within float16's range.

On chip, the state that a chunk reads is rounded to the inputs' dtype, and so is what a chunk writes. Float16 ends at
65504, which a long memory can exceed, and is coarse below 6e-5, where the whole gradient of a state can lie. Retention
is linear in what is written, so a walk carries `factor` times the state: writers are multiplied by the factor and
readers are divided by it. This is exact, in float32 and by a power of two.
"""

import torch
from torch import Tensor

LARGEST = 14  # log2 of the largest magnitude; float16 ends just below 2^16


def state_factors(y: Tensor, z: Tensor, scale: float, initial: Tensor | None) -> Tensor:
    """The factors [H] of states that scale y^T z is added to: y [B, T, H, .], z [B, T, H, .], initial [B, H, ., .].

    Decays are at most one, so no entry can exceed the norm over the tokens of its column of y times that of its column
    of z (Cauchy-Schwarz). The writers have to fit as well, whichever of y and z is multiplied. A sequence with NaN or
    infinity has no bound; the factor of its head then comes from the other sequences, and is at most 1.
    """
    y_norm, z_norm = (torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).amax(-1) for x in (y, z))
    bound = abs(scale) * torch.stack([y_norm * z_norm, y_norm, z_norm]).amax(0)
    if initial is not None:
        bound = bound + initial.abs().amax((-2, -1))
    bound = bound.nan_to_num(nan=2.0**LARGEST, posinf=2.0**LARGEST).amax(0)
    return torch.exp2(LARGEST - bound.clamp(2.0**-40, 2.0**60).log2().ceil())
