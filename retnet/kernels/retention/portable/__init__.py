"""Chunkwise retention in plain Triton: every argument, on every GPU that Triton supports."""
