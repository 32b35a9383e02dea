"""Tests of retnet, in folders that mirror the package; shared models are in `tests.small_models`."""
