"""Triton kernels, imported by `retnet.ops` when a CUDA tensor arrives. README.md follows a call through them."""
