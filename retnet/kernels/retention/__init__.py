"""Retention on a GPU: `dispatch` chooses between the portable kernels and those for Hopper GPUs."""
