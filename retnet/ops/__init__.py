"""Operators: the mathematics on tensors, without modules."""
