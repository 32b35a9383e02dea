"""Kernels of a decode step: one or a few tokens per sequence."""
