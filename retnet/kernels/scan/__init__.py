"""Mamba's selective scan, forward and backward."""
