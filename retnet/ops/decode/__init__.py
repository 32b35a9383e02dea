"""Fused operators for single-token decoding: linear layers of few rows, one retention step, deferred writes."""
