"""Changes of the weights under an engine that keeps states made with the old ones.

Looked for whenever a stored state is used or kept, so it must cost less than a token. Four signs are compared: the
modules and places that were packed, the version counters that in-place operators raise, values of every row and every
column of the weights, because changes through `.data` raise no version (adapters are merged like that), and settings
of foreign modules (adapters are switched like that).
"""

import math
from collections import defaultdict

import torch
from torch import Tensor

from retnet.models.decode.int8 import int8_parts
from retnet.models.decode.step import DecodeStep
from retnet.models.fingerprint import INTEGERS_OF_SIZE, settings
from retnet.models.lm import LanguageModel


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
            moved = not self.step.is_current
            self._changed = moved or settings(self.model) != self._settings or self._values_changed()
        return self._changed

    @property
    def known_to_have_changed(self) -> bool:
        """`changed`, if it has been looked at."""
        return self._changed is True

    def accept(self) -> None:
        """From here on, compare with the weights as they are."""
        weights = self.model.state_dict(keep_vars=True).values()
        self._tensors = [part for weight in weights for part in int8_parts(weight) or (weight,)]
        self._settings = settings(self.model)
        self._look_at_places()
        self._versions = _versions(self._tensors)
        self._samples = _joined(self._views)
        self._changed = False

    def _look_at_places(self) -> None:
        self._places = _places(self._tensors)
        self._views = _diagonals(self._tensors)

    def _values_changed(self) -> bool:
        if _versions(self._tensors) != self._versions:
            return True
        if _places(self._tensors) != self._places:
            self._look_at_places()  # moved by packing, or replaced
        samples = _joined(self._views)
        return not all(torch.equal(found, known) for found, known in zip(samples, self._samples, strict=True))


def _versions(tensors: list[Tensor]) -> list[int]:
    return [0 if x.is_inference() else x._version for x in tensors]


def _places(tensors: list[Tensor]) -> list[int]:
    return [x.data_ptr() for x in tensors]


def _diagonals(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Views of values that meet every row and every column of each tensor, per dtype and device.

    Every s-th value of rows of K values meets every row if s <= K, and every column if s and K have no common factor.
    """
    groups: dict[tuple, list[Tensor]] = defaultdict(list)
    for x in tensors:
        if not x.numel():
            continue
        extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        memory = x.detach().as_strided((extent,), (1,))  # a view, whatever the strides
        row = next((stride for stride in sorted(x.stride()) if stride > 1), extent)
        step = next(s for s in range(min(row, max(1, extent // row)), 0, -1) if math.gcd(s, row) == 1)
        groups[x.dtype, x.device].append(memory[::step])
    return list(groups.values())


def _joined(views: list[list[Tensor]]) -> list[Tensor]:
    """As integers, where NaN equals itself."""
    return [torch.cat(parts).view(INTEGERS_OF_SIZE[parts[0].element_size()]) for parts in views]
