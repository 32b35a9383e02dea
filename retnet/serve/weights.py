"""Changes of the weights under an engine that keeps states made with the old ones.

Looked for whenever a stored state is used or kept, so it must cost less than a token. Three signs are compared: the
modules and places that were packed, the version counters that in-place operators raise, and values of every row and
every column of the weights, because changes through `.data` raise no version (adapters are merged like that).
"""

from collections import defaultdict

import torch
from torch import Tensor

from retnet.models.decode.int8 import int8_parts
from retnet.models.decode.step import DecodeStep
from retnet.models.lm import LanguageModel

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes: NaN equals itself


class WeightsWatch:
    """Compares the model's weights with those that the stored states were made with, once per call of the engine."""

    def __init__(self, model: LanguageModel, step: DecodeStep):
        self.model, self.step = model, step
        self.accept()

    def look_again(self) -> None:
        """Forget the last comparison: the caller may have changed weights since."""
        self._changed: bool | None = None

    @property
    def changed(self) -> bool:
        if self._changed is None:
            self._changed = not self.step.is_current or self._values_changed()
        return self._changed

    @property
    def known_to_have_changed(self) -> bool:
        """`changed`, if it has been looked at."""
        return self._changed is True

    def accept(self) -> None:
        """From here on, compare with the weights as they are."""
        weights = self.model.state_dict(keep_vars=True).values()
        self._tensors = [part for weight in weights for part in int8_parts(weight) or (weight,)]
        self._versions = _versions(self._tensors)
        self._samples = _samples(self._tensors)
        self._changed = False

    def _values_changed(self) -> bool:
        if _versions(self._tensors) != self._versions:
            return True
        samples = _samples(self._tensors)
        return not all(torch.equal(found, known) for found, known in zip(samples, self._samples, strict=True))


def _versions(tensors: list[Tensor]) -> list[int]:
    return [0 if x.is_inference() else x._version for x in tensors]


def _samples(tensors: list[Tensor]) -> list[Tensor]:
    """Diagonals of the matrices, which meet every row and every column, and whole vectors, per dtype and device."""
    groups: dict[tuple, list[Tensor]] = defaultdict(list)
    for x in tensors:
        flat = x.detach().reshape(-1)
        row = x.shape[-1] if x.dim() > 1 else 0
        num_rows = flat.numel() // max(1, row)
        starts = range(0, max(1, row), max(1, num_rows))
        groups[x.dtype, x.device] += [flat[start :: row + 1] for start in starts]
    return [torch.cat(parts).view(_INTEGERS[parts[0].element_size()]) for parts in groups.values()]
