"""Decoding: the fused decode step, sampling, and a plain generation loop."""
