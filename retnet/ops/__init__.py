"""Operators: functions of tensors, without modules."""
