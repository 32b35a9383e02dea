"""Tensor parallelism of a language model: the plan for torch, the vocabulary, and whole weights and states."""
