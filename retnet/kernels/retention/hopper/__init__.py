"""Chunkwise retention for Hopper GPUs: the state stays on chip."""
