"""Chunkwise retention in plain Triton: every argument, every GPU that Triton knows."""
