"""Changes of the weights under an engine that keeps states made with the old ones.

Version counters of tensors do not see changes through `.data`, as adapters make when they are merged. So the weights
are summed whenever a stored state is used or kept, which takes about as long as decoding one token.
"""

from retnet.models.fingerprint import checksum
from retnet.models.lm import LanguageModel


class WeightsWatch:
    """Compares the model's weights with those that the stored states were made with, once per call of the engine."""

    def __init__(self, model: LanguageModel):
        self.model = model
        self.accept()

    def look_again(self) -> None:
        """Forget the last comparison: the caller may have changed weights since."""
        self._changed: bool | None = None

    @property
    def changed(self) -> bool:
        if self._changed is None:
            self._changed = checksum(self.model) != self._known
        return self._changed

    @property
    def known_to_have_changed(self) -> bool:
        """`changed`, if it has been looked at."""
        return self._changed is True

    def accept(self) -> None:
        """From here on, compare with the weights as they are."""
        self._known = checksum(self.model)
        self._changed = False
