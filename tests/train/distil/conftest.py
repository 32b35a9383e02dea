"""The fixtures of training runs: one thread, a fixed peak rate, short texts."""

from tests.train.conftest import fixed_peak, one_thread, short_texts

__all__ = ["fixed_peak", "one_thread", "short_texts"]
